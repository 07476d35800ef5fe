"""What `duplex inspect` is made of.

reading.py   a `.pt` from outside -> codes, or the finding that says why not
known.py     what is known besides the codes: checkpoint, tokenizer, recordings
folders.py   many files: stage folders, plain folders, what they share
view.py      tables for people
picture.py   the timeline
"""
