"""Holds the same conversations with several models, and says which did better and how sure that is.

asked        items (prompts, and the user's side spoken); rubric (of a judge model)
held         client (one conversation over the wire), play (all items with one server), batch,
             batch_worker and offline (with a checkpoint, without a server), checkpoints (both)
heard        listening (where speech is, recogniser, DNSMOS), heard (audio against text)
measured     scoring (what is found in one conversation), grounding, measures (rows over many),
             likelihood and its worker (teacher-forced), people (grades that people gave)
said         verdicts, comparison (reports of other days), judge and judged (a model's word)
shown        found (report.json and tables), report, judge_page, drawing, audio, origins,
             wandb_tables
a benchmark  bench_folders, bench_report
"""
