"""Dialogues from any OpenAI-compatible endpoint: hosted, vLLM, Ollama.

writer      persona and scenario -> turns, candidate after candidate
annotate    a dialogue that exists -> system prompts for it
critic      a candidate -> keep it or not, by a model
brief, replies      what the model is told; what is made of what it says
client      one request through everything below
exchanges   the log: what was sent and answered, read again by a resume
budget      what a request may cost at most, and the hard stop
pace        pauses that all threads keep
dialect     which parameters the endpoint takes
wire        HTTP, by openai's library
"""
