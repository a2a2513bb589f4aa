"""From shards of raw media to shards of features, with frozen encoders as Ray actors: docs/features.md.

recipe.py    what is encoded and how, checked before any work
encoders.py  the frozen encoders: built, identified, run over a batch
shard.py     one shard, from its members to its features
actors.py    Ray actors that each encode one shard after the other, and are replaced where they die
snippet.py   the config with which training reads the features
encode.py    the command: plan, restart, manifest, summary
"""
