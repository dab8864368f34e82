"""Types of run-config values that more than one file names."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from hosl_flower.config.text_values import checked_name, checked_path

Scalar = bool | int | float | str
Dtype = Literal["float32", "bfloat16", "float16"]
Perturbation = Literal["rank1", "signs", "gaussian"]
Trainable = Literal["full", "blocks", "lora"]
Optimizer = Literal["sgd", "adamw"]
Derivative = Literal["differences", "forward-mode"]
Schedule = Literal["constant", "linear", "cosine"]
ClientOptimizer = Literal["sgd", "adamw", "adafactor", "adafactor-momentum"]
ClientGradient = Literal["backprop", "exact", "recompute", "residual"]
Labels = Literal["server", "client"]
Quantization = Literal["none", "int8"]
Codec = Literal["exact", "bf16", "fp16", "int8"]  # see activation_codec.py, which needs torch
UpdateCodec = Literal["exact", "int8"]  # see tensors/update_codec.py
Partitioner = Literal["iid", "dirichlet", "natural-id"]
Aggregation = Literal["weighted-mean", "mean", "median", "trimmed-mean"]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")]
Natural = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Threads = Annotated[int, Field(ge=0, le=1024)]
Alpha = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Length = Annotated[int, Field(ge=8, lt=2**31)]
LocalPath = Annotated[str, AfterValidator(checked_path)]
DirectoryName = Annotated[str, AfterValidator(checked_name)]
