"""What a run is: frozen, keyword-only dataclasses, without torch.

A field tagged ``PerRun`` may differ between the runs of one fleet (it is a tensor [R] there); every other field is structural:
it changes shapes or code, so runs that differ in it train in different fleets. A run's id is the hash of its full resolved config.

    RunConfig(task=Modular(p=97, operation="div"), optimizer=AdamW(lr=1e-3, wd=1.0), steps=3000)
"""

from shoal.config.core import PerRun, RunConfig, Schedule, Seeds, StudyConfig, fields_per_run, flatten, run_id, with_seed, with_values
from shoal.config.models import BigramConfig, DecoderConfig, EmbeddingMLPConfig, EncoderConfig, HMMConfig, ModelConfig, ModuleConfig
from shoal.config.optimizers import SGD, Adagrad, Adam, AdamW, BaumWelch, Gradient, Muon, OptimizerConfig, Weights
from shoal.config.tasks import LanguageConfig, MemorizeConfig, ModularConfig, MQARConfig, RecallConfig, SentencesConfig, TaskConfig

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "BaumWelch",
    "BigramConfig",
    "DecoderConfig",
    "EmbeddingMLPConfig",
    "EncoderConfig",
    "Gradient",
    "HMMConfig",
    "LanguageConfig",
    "MQARConfig",
    "MemorizeConfig",
    "ModelConfig",
    "ModularConfig",
    "ModuleConfig",
    "Muon",
    "OptimizerConfig",
    "PerRun",
    "RecallConfig",
    "RunConfig",
    "Schedule",
    "Seeds",
    "SentencesConfig",
    "StudyConfig",
    "TaskConfig",
    "Weights",
    "fields_per_run",
    "flatten",
    "run_id",
    "with_seed",
    "with_values",
]
