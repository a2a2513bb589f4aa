"""From published layouts, and from any folder with a table, to indexed WebDataset shards: docs/packing.md.

table.py         rows of a CSV, TSV or JSONL file, and where each stands
files.py         samples from a table that names files
arrays.py        samples from memory-mapped .npy and .pt arrays
command.py       the options of the command line
symile_m3.py     Symile-M3, both layouts
symile_mimic.py  Symile-MIMIC
plan.py          which samples go into which shard
writer.py        writes the shards, in parts and processes, and goes on after a kill
"""
