"""Python code that uses an exported model with transformers alone, for the model card.

The code is for one run: it contains the prompt, the label words as token IDs and the lengths of
that run, and scores as the run did. `hosl-flower predict` gives the same numbers.
"""

from hosl_flower.config.client_spec import client_spec
from hosl_flower.data.encoders.classifier_text import TextInputs
from hosl_flower.data.encoders.make import make_inputs
from hosl_flower.data.encoders.prompts import PromptEncoder
from hosl_flower.export.finished_run import Finished
from hosl_flower.models.base_model import load_model_config
from hosl_flower.models.families.registry import family_of
from hosl_flower.models.special_tokens import prefix
from hosl_flower.tasks.answer_words import AnswerWords
from hosl_flower.tasks.generated_answers import Completion
from hosl_flower.tasks.prompt_template import pieces

_HERE = "this directory, or the name of its repository on the Hugging Face Hub"

_IMAGES = """import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

directory = "."  # {here}
processor = AutoImageProcessor.from_pretrained(directory)
model = AutoModelForImageClassification.from_pretrained(directory).eval()


def predict(path):
    pixels = np.asarray(Image.open(path).convert("{mode}")){axis}
    inputs = processor(pixels, input_data_format="channels_last", return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits[0].softmax(0).tolist()
    return {{model.config.id2label[i]: p for i, p in enumerate(probabilities)}}


print(predict("image.png"))"""

_CLASSES = """import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

directory = "."  # {here}
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForSequenceClassification.from_pretrained(directory).eval()


def predict(example):
    texts = [{texts}]
    inputs = tokenizer(*texts, truncation=True, max_length={length}, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits[0].softmax(0).tolist()
    return {{model.config.id2label[i]: p for i, p in enumerate(probabilities)}}


{example}
print(predict(example))"""

_LOAD = """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

directory = "."  # {here}
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory).eval()
"""

_LOAD_ADAPTERS = """import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

directory = "."  # {here}
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained({base!r})  # the base model
model = PeftModel.from_pretrained(model, directory).eval()
"""

_PROMPT = """

def encode(text):
    return tokenizer(text, add_special_tokens=False).input_ids


def prompt(example):
    ids = encode({rendered}){cut}
    return {start} + ids

"""

_CUT = """
    if len(ids) > {most}:  # the text is cut, the end of the prompt is not
        ids = encode({first})[:{kept}] + encode({tail!r})"""

_WORD = """
def predict(example):
    with torch.no_grad():
        logits = model(torch.tensor([prompt(example)])).logits[0, -1]
    probabilities = logits[list(words.values())].softmax(0).tolist()
    return dict(zip(words, probabilities))


{example}
print(predict(example))"""

_WORDS = """
def score(ids, word):
    with torch.no_grad():
        logits = model(torch.tensor([ids + word[:-1]])).logits[0, -len(word) :]
    return logits.log_softmax(1)[range(len(word)), word].sum()


def predict(example):
    ids = prompt(example)
    scores = torch.stack([score(ids, word) for word in words.values()])
    return dict(zip(words, scores.softmax(0).tolist()))


{example}
print(predict(example))"""

_ANSWER = """
def predict(example):
    ids = torch.tensor([prompt(example)])
    with torch.no_grad():
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens={longest},
            eos_token_id={ends},
        )
    text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return text.lstrip().partition("\\n")[0].strip()


{example}
print(predict(example))"""


def usage(run: Finished, base: str = "") -> str:
    """Return code that defines `predict` for an exported model and calls it.

    Args:
        run: the finished run.
        base: for adapters, the name or directory of their base model.
    """
    model = str(run.model)
    config = load_model_config(model)
    spec = client_spec(run.config, "", model, run.task, "")
    encoder = make_inputs(spec, model, config)
    if family_of(config).modality == "image":
        gray = config.num_channels == 1
        return _IMAGES.format(
            here=_HERE, mode="L" if gray else "RGB", axis="[..., None]" if gray else ""
        )
    lines = [f"    {name!r}: 'Write your text here.'," for name in run.task.fields]
    example = "\n".join(["example = {", *lines, "}"])
    if isinstance(encoder, TextInputs):
        texts = ", ".join(f"example[{name!r}]" for name in run.task.fields)
        return _CLASSES.format(here=_HERE, texts=texts, length=encoder.length, example=example)
    assert isinstance(encoder, PromptEncoder)
    load = _LOAD_ADAPTERS.format(here=_HERE, base=base) if base else _LOAD.format(here=_HERE)
    return load + _words(encoder) + _prompt(encoder) + _predict(encoder, example)


def _words(encoder: PromptEncoder) -> str:
    """The label words as token IDs."""
    answers, task = encoder.answers, encoder.task
    if not isinstance(answers, AnswerWords):
        return ""
    single = answers.sequences == 1
    rows = zip(task.label_names or task.verbalizers, task.verbalizers, answers.tokens, strict=True)
    lines = [
        f"    {label!r}: {tokens[0] if single else tokens},  # the word {word!r}"
        for label, word, tokens in rows
    ]
    return "\n".join(["words = {  # token IDs by label", *lines, "}", ""])


def _prompt(encoder: PromptEncoder) -> str:
    pairs, tail = pieces(encoder.task.prompt.rstrip(" "))
    parts = [f"{repr(text) + ' + ' if text else ''}example[{name!r}]" for text, name in pairs]
    whole = [*parts, *[repr(tail)] * bool(tail)]
    rendered = " + ".join(whole)
    if len(parts) > 1:
        rendered = "\n        " + "\n        + ".join(whole) + "\n    "
    start = prefix(encoder.tokenizer)
    cut = ""
    if len(pairs) == 1:
        most = encoder.max_length - len(start) - (encoder.answers.longest - 1)
        kept = most - len(encoder.tokenizer(tail, add_special_tokens=False).input_ids)
        cut = _CUT.format(most=most, first=parts[0], kept=kept, tail=tail)
    return _PROMPT.format(rendered=rendered, cut=cut, start=start)


def _predict(encoder: PromptEncoder, example: str) -> str:
    answers = encoder.answers
    if isinstance(answers, Completion):
        ends = sorted(answers.ends)
        return _ANSWER.format(longest=answers.longest, ends=ends, example=example)
    return (_WORD if answers.sequences == 1 else _WORDS).format(example=example)
