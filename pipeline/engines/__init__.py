"""What a stage talks to: writers of dialogues, speech engines, recognisers, codecs."""
