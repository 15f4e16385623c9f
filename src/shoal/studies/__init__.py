"""One file per study. Each has ``PRESETS`` (name -> function returning a StudyConfig), ``DEFAULT`` (preset without a GPU, with one) and ``study(config)``."""

STUDIES = {
    "sanity": "shoal.studies.sanity",
    "arithmetic": "shoal.studies.arithmetic",
    "grokking": "shoal.studies.grokking",
    "grokking-ablations": "shoal.studies.grokking_ablations",
    "grokking-interventions": "shoal.studies.grokking_interventions",
    "grokking-stability": "shoal.studies.grokking_stability",
    "grokking-init": "shoal.studies.grokking_init",
    "grokking-tokens": "shoal.studies.grokking_tokens",
    "grokking-progress": "shoal.studies.grokking_progress",
    "grokking-fractions": "shoal.studies.grokking_fractions",
    "grokking-operations": "shoal.studies.grokking_operations",
    "grokking-heatmap": "shoal.studies.grokking_heatmap",
    "grokking-mixtures": "shoal.studies.grokking_mixtures",
    "grokking-optimizers": "shoal.studies.grokking_optimizers",
    "recall-induction": "shoal.studies.recall_induction",
    "recall-capacity": "shoal.studies.recall_capacity",
    "recall-width": "shoal.studies.recall_width",
    "recall-state": "shoal.studies.recall_state",
    "recall-mamba-paper": "shoal.studies.recall_mamba_paper",
}
