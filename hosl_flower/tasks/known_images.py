"""The image classification tasks that come with the package: classes in the order of the labels.

The classes stand where text tasks have answer words: an image classifier is a model with a
vocabulary of as many words.
"""

from hosl_flower.tasks.task import Columns, Task

_DIGITS = tuple("0123456789")
_IMAGE: Columns = {"image": ("img", "images")}

_CIFAR_100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""


def image_task(name: str, classes: tuple[str, ...], image: str, source: str = "") -> Task:
    """A task whose labels are numbers or the names of the classes."""
    return Task(
        name=name,
        prompt="",
        verbalizers=classes,
        label_names=tuple(word.lower() for word in classes),
        source=source,
        columns=_IMAGE,
        image=image,
    )


def _fine(task: Task) -> Task:
    return Task(**{**vars(task), "label_column": "fine_label", "columns": _FINE})


_FINE: Columns = {**_IMAGE, "fine_label": ("label",)}

IMAGE_TASKS = {
    task.name: task
    for task in (
        image_task(
            "cifar10",
            (
                "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                "truck",
            ),
            "image",
            "hub:uoft-cs/cifar10/plain_text",
        ),
        _fine(
            image_task(
                "cifar100", tuple(_CIFAR_100.split()), "image", "hub:uoft-cs/cifar100/cifar100"
            )
        ),
        image_task("mnist", _DIGITS, "image", "hub:ylecun/mnist/mnist"),
        image_task(
            "fashion-mnist",
            (
                "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
                "Bag", "Ankle boot",
            ),
            "image",
            "hub:zalando-datasets/fashion_mnist/fashion_mnist",
        ),
        image_task("digits", _DIGITS, "image", "bundled:digits"),
    )
}  # fmt: skip
