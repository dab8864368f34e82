"""What stands between a task's examples and a model, of text or images, which the model decides."""

from transformers import PretrainedConfig

from hosl_flower.config.client_spec import ClientSpec
from hosl_flower.data.encoders.base import ExampleEncoder
from hosl_flower.data.encoders.classifier_text import TextInputs
from hosl_flower.data.encoders.prompts import PromptEncoder
from hosl_flower.errors import ConfigError
from hosl_flower.models.families.registry import family_of
from hosl_flower.models.processors import load_tokenizer


def make_inputs(spec: ClientSpec, model: str, config: PretrainedConfig) -> ExampleEncoder:
    """The inputs of a run's task for a model, by its configuration. ConfigError when they do not
    fit each other, or labels cannot stay on clients."""
    _check_fit(spec, model, config)
    family = family_of(config)
    if family.modality == "text":
        tokenizer = load_tokenizer(model)
        if family.classes:
            return TextInputs(spec.task, tokenizer, config, spec.max_length)
        return PromptEncoder(spec.task, tokenizer, spec.max_length, spec.max_new_tokens)
    from hosl_flower.data.encoders.images import ImageInputs  # brings Pillow
    from hosl_flower.models.image_processors import load_image_processor  # brings Pillow

    processor = load_image_processor(model, config, spec.image_size)
    return ImageInputs(spec.task, processor, config, spec.cut_layer)


def _check_fit(spec: ClientSpec, model: str, config: PretrainedConfig) -> None:
    task, family = spec.task, family_of(config)
    if (family.modality == "image") != bool(task.image):
        about = "images" if task.image else "text"
        raise ConfigError(
            f"task {task.name} is about {about}, {model} is a model of {family.modality} "
            f"({config.model_type}): choose another model or task"
        )
    if task.target and family.classes:
        raise ConfigError(
            f"the answers of task {task.name} are generated, {model} is a classifier "
            f"({config.model_type}): choose another model or task"
        )
    if spec.activation_noise and task.target:
        raise ConfigError(
            f"activation-noise is for choices among answer words and classes, the answers of task "
            f"{task.name} are generated"
        )
    if spec.labels == "client" and (family.classes or task.target):
        what = (
            f"task {task.name} is about {'images' if task.image else 'answers that are generated'}"
        )
        if family.classes and not task.image:
            what = f"{model} is a classifier ({config.model_type})"
        raise ConfigError(
            f"labels = client is for choices among answer words, {what}; use labels = server"
        )
