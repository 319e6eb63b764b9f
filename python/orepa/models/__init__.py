"""The authors' nine models, registered with timm: ``timm.create_model("orepa_resnet50")``.

Each is timm's plain model with its convolutions swapped by `orepa.prepare` (RepVGG: its blocks by `orepa.RepVGGBlock`),
so that ``features_only``, ``output_stride``, ``in_chans``, ``num_classes`` and the rest are timm's. Beyond timm's arguments
they take ``topology`` (of every convolution that is swapped; by default the paper's choice for its kernel size), ``scaling``
and ``backend``; see `orepa.OREPAConv`.

There are no weights to download: ``pretrained=True`` is an error unless ``pretrained_cfg_overlay={"file": ...}`` names a
checkpoint, the authors' included. `orepa.load_official` loads those directly.

Needs the extra ``models``. Importing this module registers the models.
"""

from .timm_models import MODELS, ModelSpec, create_on_meta, parameter_counts, spec_of, timm_repvgg_block

__all__ = ["MODELS", "ModelSpec", "create_on_meta", "parameter_counts", "spec_of", "timm_repvgg_block"]
