"""Serving: one model, its prompt proven from its own input cache, over Moshi's wire format.

wire.py          messages, queries, URLs, digests   pure
text.py          text tokens -> UTF-8 pieces        pure
conversation.py  LM, codec and tokenizer: begin with a prompt, step a frame
chat.py          one conversation over one WebSocket
app.py           the routes, the process
launch.py        the server as a child process
probe.py         proves from outside that a server took the prompt of its URL
"""
