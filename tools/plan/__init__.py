"""`symile-dist plan`: what a run will need, before it is started. Formulas, sources and figures: docs/plan.md."""
