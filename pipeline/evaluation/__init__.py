"""Plays the same user audio to the base and the merged model, and measures what differs.

items.py     what is asked: prompts and the user's side, spoken
client.py    one conversation with a server, frame by frame
play.py      all items to one server
scoring.py   a conversation -> measures; measures of many -> a table
audio.py     WAV to keep, Ogg/Opus to embed
drawing.py   timelines and curves as SVG
report.py    one page that holds it all
rubric.py    what a judge model is asked
judge.py     one question to it, and what is made of the answer
judged.py    its answers -> scores, preferences, verdicts
people.py    grades that people gave, beside ours
"""
