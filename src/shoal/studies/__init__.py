"""One file per study. Each has ``PRESETS`` (name -> function returning a StudyConfig), ``DEFAULT`` (preset without a GPU, with one) and ``study(config)``."""

STUDIES = {
    "sanity": "shoal.studies.sanity",
    "arithmetic": "shoal.studies.arithmetic",
    "grokking": "shoal.studies.grokking",
}
