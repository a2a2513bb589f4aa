"""Every name that a config can use, and how a name becomes a class.

The registries are plain dicts from a name to "package.module:Class". They hold strings, so that reading a config
imports neither torch nor any encoder. Whoever has a class of her own writes "package.module:Class" in the config;
both ways meet in `resolve`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any

DECODERS: dict[str, str] = {
    "image": "symile_dist.data.decode:decode_image",
    "audio": "symile_dist.data.decode:decode_audio",
    "text": "symile_dist.data.decode:decode_text",
    "npy": "symile_dist.data.decode:decode_npy",
}
TRANSFORMS: dict[str, str] = {
    "image": "symile_dist.data.transforms:ImageTransform",
    "waveform": "symile_dist.data.transforms:WaveformTransform",
    "characters": "symile_dist.data.transforms:CharacterTransform",
    "tokens": "symile_dist.data.tokens:TokensTransform",
    "whisper_features": "symile_dist.data.whisper:WhisperTransform",
    "tensor": "symile_dist.data.transforms:TensorTransform",
    "features": "symile_dist.data.augment:FeaturesTransform",
}
ENCODERS: dict[str, str] = {
    "image_convnet": "symile_dist.encoders.image:ImageConvNet",
    "audio_convnet": "symile_dist.encoders.audio:AudioConvNet",
    "text_convnet": "symile_dist.encoders.text:TextConvNet",
    "mlp": "symile_dist.encoders.mlp:MLP",
    "feature_transformer": "symile_dist.encoders.sequence:FeatureTransformer",
    "identity": "symile_dist.encoders.identity:Identity",
    "one_hot": "symile_dist.encoders.identity:OneHot",
    "features": "symile_dist.encoders.features:FeatureEncoder",
    "resnet": "symile_dist.encoders.resnet:ResNet",
    "xlm_roberta": "symile_dist.encoders.xlm_roberta:XLMRobertaEncoder",
    "pretrained": "symile_dist.encoders.pretrained:PretrainedEncoder",
    "points": "symile_dist.encoders.points:Points",
    "image_points": "symile_dist.encoders.points:ImagePoints",
    "text_points": "symile_dist.encoders.points:TextPoints",
    "vit_points": "symile_dist.encoders.points:ViTPoints",
    "text_transformer_points": "symile_dist.encoders.points:TextTransformerPoints",
}
OBJECTIVES: dict[str, str] = {
    "symile": "symile_dist.objectives.symile:SymileObjective",
    "pairwise_clip": "symile_dist.objectives.clip:PairwiseClipObjective",
    "pairwise_sigmoid": "symile_dist.objectives.sigmoid:PairwiseSigmoidObjective",
    "gram": "symile_dist.objectives.geometry:GramObjective",
    "confu": "symile_dist.objectives.confu:ConFuObjective",
    "gated_symile": "symile_dist.objectives.gated:GatedSymileObjective",
    "triangle": "symile_dist.objectives.geometry:TriangleObjective",
    "factorcl": "symile_dist.objectives.factorcl:FactorCLObjective",
    "wpse": "symile_dist.objectives.wpse:WPSEObjective",
}
LOGGERS: dict[str, str] = {
    "wandb": "symile_dist.metrics.loggers:WandbLogger",
    "mlflow": "symile_dist.metrics.loggers:MlflowLogger",
}


def suggestion(word: str, known: Mapping[str, Any] | list[str]) -> str:
    """ "; did you mean 'x'?" where something close is known, else a list of what is known."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


def unknown_name(name: str, registry: Mapping[str, str], kind: str) -> str | None:
    """What is wrong with a name, or None. Imports nothing, so a config is checked in milliseconds."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        if not all(part.isidentifier() for part in module.split(".")) or not attribute.isidentifier():
            return f"'{name}' is not of the form package.module:Name"
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) is None:  # looks for it without importing it
            return f"{kind} '{name}': no package '{package}' is found; install it or put its folder on PYTHONPATH"
        return None
    if name in registry:
        return None
    return f"unknown {kind} '{name}'{suggestion(name, registry)}, or package.module:Name for one of your own"


def resolve(name: str, registry: Mapping[str, str], kind: str) -> Any:
    """The class or function behind a registry name or a "package.module:Name".

    Raises ValueError when there is none, with what to do about it.
    """
    problem = unknown_name(name, registry, kind)
    if problem:
        raise ValueError(problem)
    module, _, attribute = registry.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ValueError(f"{kind} '{name}': cannot import {module} ({error}); is its package on PYTHONPATH?") from error
    except AttributeError as error:
        raise ValueError(f"{kind} '{name}': {module} has no '{attribute}'") from error
    if not callable(found):  # its value is not shown: it may be a secret
        raise ValueError(f"{kind} '{name}': is neither a class nor a function")
    return found


def check_options(target: Any, options: Mapping[str, Any], kind: str, name: str, fixed: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless `target` takes `fixed` (what we pass) together with `options` (what the user wrote)."""
    parameters = inspect.signature(target).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    allowed = [p for p in parameters if p not in fixed and p != "self"]
    for option in options:
        if option not in allowed:
            raise ValueError(f"{kind} '{name}': unknown option '{option}'{suggestion(option, allowed)}")
    missing = [p for p in allowed if parameters[p].default is inspect.Parameter.empty and p not in options]
    if missing:
        raise ValueError(f"{kind} '{name}': option '{missing[0]}' is missing")
    for option, value in options.items():
        if parameters[option].annotation in (bool, "bool") and not isinstance(value, bool):  # "no" would be true
            raise ValueError(f"{kind} '{name}': {option} = {value!r} should be true or false")


def build(name: str, options: Mapping[str, Any], registry: Mapping[str, str], kind: str, **fixed: Any) -> Any:
    """Makes one component: `resolve`, `check_options`, call. Raises ValueError for a user's mistake."""
    target = resolve(name, registry, kind)
    check_options(target, options, kind, name, tuple(fixed))
    try:
        return target(**fixed, **options)
    except (TypeError, AttributeError) as error:  # what comes of an option of the wrong type
        raise ValueError(f"{kind} '{name}': {error}; are its options of the right type?") from error
