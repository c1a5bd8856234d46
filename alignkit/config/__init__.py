"""The one configuration of a run: nested sections read from YAML, with ``section.key=value`` overrides.

Every section refuses unknown keys and wrong types before any model is loaded, in one line that names
the file and the key. `load_config` is the only way in; commands get a frozen `Config`.
"""

from alignkit.config.demo import demo_config, draws_clips
from alignkit.config.finding import full_name, shipped_config, shipped_configs
from alignkit.config.noise import NoiseSection, ReferenceSection, RolloutSection, Sampler
from alignkit.config.objective import OBJECTIVES, ObjectiveSection
from alignkit.config.online import OnlineSection
from alignkit.config.places import check_model_place, check_places, store_read
from alignkit.config.ranker import RankerSection
from alignkit.config.reading import changed, dump_config, load_config, merged
from alignkit.config.sections import (
    DataSection,
    DeepSpeedSection,
    EvaluationSection,
    Family,
    LoraSection,
    MaskSection,
    ModelSection,
    OutputSection,
    PairsSection,
    SampleSection,
    Section,
    TrainSection,
)
from alignkit.config.student import StudentSection
from alignkit.config.whole import Config, StageSection

__all__ = [
    "OBJECTIVES",
    "Config",
    "DataSection",
    "DeepSpeedSection",
    "EvaluationSection",
    "Family",
    "LoraSection",
    "MaskSection",
    "ModelSection",
    "NoiseSection",
    "ObjectiveSection",
    "OnlineSection",
    "OutputSection",
    "PairsSection",
    "RankerSection",
    "ReferenceSection",
    "RolloutSection",
    "SampleSection",
    "Sampler",
    "Section",
    "StageSection",
    "StudentSection",
    "TrainSection",
    "changed",
    "check_model_place",
    "check_places",
    "demo_config",
    "draws_clips",
    "dump_config",
    "full_name",
    "load_config",
    "merged",
    "shipped_config",
    "shipped_configs",
    "store_read",
]
