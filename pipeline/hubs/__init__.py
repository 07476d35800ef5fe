"""What `duplex push` and `duplex pull` are made of; `pipeline/hub.py` is what the command calls."""
