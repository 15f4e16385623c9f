"""shoal trains many small sequence models at once and tells you, with statistics, what they learned.

    import shoal

    config = shoal.StudyConfig(run=shoal.RunConfig(task=shoal.ModularConfig(p=23), steps=500), grid={"optimizer.lr": [1e-3, 1e-2]})

Names are looked up when they are used (PEP 562), so ``import shoal`` costs nothing and imports no torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "shoal.config": (
        "RunConfig", "StudyConfig", "Schedule", "Seeds", "PerRun",
        "ModularConfig", "MemorizeConfig", "RecallConfig", "MQARConfig", "LanguageConfig",
        "DecoderConfig", "EmbeddingMLPConfig", "BigramConfig", "HMMConfig", "ModuleConfig",
        "SGD", "Adam", "AdamW", "Adagrad", "Muon", "BaumWelch",
    ),
    "shoal.config.fields": ("ConfigError",),
    "shoal.studies.study": ("Study", "grid"),
    "shoal.results.claims": ("Claim", "Sample"),
    "shoal.results.figures": ("Figure", "curves", "dots", "survival"),
    "shoal.results.rows": ("Rows",),
    "shoal.studies.driver": ("run", "load", "report"),
    "shoal.inference": ("evaluate", "generate", "score", "classify"),
}  # fmt: skip
_MODULE = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    return getattr(import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE})
