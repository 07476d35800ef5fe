"""The claims of the documents that the project started from, measured with the pocket model.

plan.py    configs/results/NAME.yaml -> the claim, its arms and its cells
cells.py   a cell: an arm with a seed, run through the pipeline, and what it said
tables.py  cells -> each arm against the reference: pure
plots.py   the figures
page.py    docs/results/claims/NAME.md, from NAME.json and nothing else
index.py   docs/results/claims/README.md, with what to try on the 7B
"""
