"""Pocket models that speak: a codec and a base, trained from nothing on speech made here."""
