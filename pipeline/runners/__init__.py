"""How a stage's tasks are worked off: here, or elsewhere. Stages do not know the difference."""
