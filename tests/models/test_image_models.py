"""Image classifiers: what a family must satisfy to be split, trained and saved."""

import pytest
import torch
from gradients import both
from image_models import PIXELS, SIZE, VARIANTS
from image_models import saved as saved  # a fixture
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTModel

from hosl_flower.errors import ConfigError, ModelError
from hosl_flower.gradients.exact import exact_gradients
from hosl_flower.gradients.recompute import recomputed_gradients
from hosl_flower.gradients.residual import fed_back, residual_gradients
from hosl_flower.models.architectures import architecture
from hosl_flower.models.base_model import open_base
from hosl_flower.models.batch import Batch
from hosl_flower.models.class_head import with_classes
from hosl_flower.models.families.images import IMAGE_FAMILIES
from hosl_flower.models.image_processors import load_image_processor
from hosl_flower.models.save_merged import save_merged
from hosl_flower.models.split import client_skeleton, load_client, load_server, server_skeleton
from hosl_flower.models.submodels import count, trainable_parameters
from hosl_flower.tensors.cut_gradient import Cotangent


def halves(directory, cut, dtype=torch.float32):
    base = open_base(str(directory))
    return load_client(base, cut, dtype, "cpu"), load_server(base, cut, torch.float32, "cpu")


@torch.no_grad()
def logits_of(client, server):
    h = client(PIXELS, torch.ones(3, 1))
    return server(h.float(), torch.ones(h.shape[:2]))[:, 0]


@pytest.mark.parametrize("name", VARIANTS)
def test_split_equals_unsplit_at_every_cut(saved, name):
    directory, model = saved(name)
    with torch.no_grad():
        whole = model(PIXELS).logits
    family = IMAGE_FAMILIES[model.config.model_type]
    for cut in range(open_base(str(directory)).blocks + 1):
        client, server = halves(directory, cut)
        h = client(PIXELS, torch.ones(3, 1))
        assert list(h.shape) == [3, family.sequence(model.config, cut, SIZE), client.hidden_size]
        assert client.hidden_size == family.width(model.config, cut)
        assert torch.allclose(logits_of(client, server), whole, rtol=1e-5, atol=1e-5)
        rows = server.lm_head.weight[[4, 1]] + 0  # of two classes, with the biases of two
        server.lm_head.bias = torch.nn.Parameter(server.lm_head.bias[[4, 1]])
        with torch.no_grad():
            answers = server.answer_logits(h, torch.ones(h.shape[:2]), rows)
        assert torch.allclose(answers, whole[:, [4, 1]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_sides_share_nothing_and_merge_into_what_transformers_loads(saved, name, tmp_path):
    directory, model = saved(name)
    client, server = halves(directory, 2)
    sides = [side.canonical_parameters() for side in (client, server)]
    assert sides[0].keys() | sides[1].keys() == dict(model.named_parameters()).keys()
    assert not sides[0].keys() & sides[1].keys()
    with torch.no_grad():
        for parameter in (*client.parameters(), *server.parameters()):
            parameter.add_(0.01)
    base = open_base(str(directory))
    processor = load_image_processor(str(directory), base.config, SIZE)
    tensors = client.merged_parameters(), server.merged_parameters()
    save_merged(tmp_path / "merged", base, *tensors, processor)
    loaded, told = AutoModelForImageClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    with torch.no_grad():
        found = loaded.eval()(PIXELS).logits
    assert torch.allclose(found, logits_of(client, server), rtol=1e-5, atol=1e-5)
    for name, buffer in model.named_buffers():
        assert torch.equal(dict(loaded.named_buffers())[name], buffer)  # no statistic has moved


def test_old_names_and_those_of_a_bare_vit_are_read(saved):
    directory, model = saved("vit")
    assert "vit.encoder.layer.0.attention.attention.query.weight" in load_file(
        directory / "model.safetensors"
    )
    bare = ViTModel(model.config, add_pooling_layer=True)
    bare.load_state_dict(model.vit.state_dict(), strict=False)
    bare.save_pretrained(directory)
    base = open_base(str(directory))
    assert base.source.blocks() == 3
    with pytest.raises(ModelError, match=r"no tensor 'classifier.weight'"):
        load_server(base, 1, torch.float32, "cpu")
    headed, fresh = with_classes(base, ["a", "b", "c", "d", "e"], seed=4)  # as many as before
    assert fresh
    server = load_server(headed, 1, torch.float32, "cpu")
    assert server.lm_head.weight.shape == (5, 32)
    assert 0.01 < server.lm_head.weight.std() < 0.03
    again = load_server(with_classes(base, list("abcde"), 4)[0], 1, torch.float32, "cpu")
    assert torch.equal(server.lm_head.weight, again.lm_head.weight)


def test_a_head_for_other_classes_is_a_fresh_one(saved):
    base = open_base(str(saved("resnet")[0]))
    same, fresh = with_classes(base, list("abcde"), 0)
    assert not fresh
    assert same.config.id2label == dict(enumerate("abcde"))
    seven, fresh = with_classes(base, list("abcdefg"), 0)
    assert fresh
    assert load_server(seven, 1, torch.float32, "cpu").lm_head.weight.shape == (7, 24)
    assert base.config.num_labels == 5


PUBLISHED = {  # parameters with the 1,000 classes of ImageNet, and with 10
    "resnet-18": (11_689_512, 11_181_642),
    "resnet-50": (25_557_032, 23_528_522),
    "vit-base-patch16-224": (86_567_656, 85_806_346),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_on_the_meta_device(name):
    for classes, expected in zip((1000, 10), PUBLISHED[name], strict=True):
        config = architecture(name)
        config.num_labels = classes
        for cut in (0, 2):
            sides = client_skeleton(config, cut), server_skeleton(config, cut)
            assert all(p.is_meta for side in sides for p in side.parameters())
            assert sum(count(side.canonical_parameters()) for side in sides) == expected


def test_resnet18_shapes_at_every_cut():
    config, family = architecture("resnet-18"), IMAGE_FAMILIES["resnet"]
    at = {
        size: [(family.sequence(config, cut, size), family.width(config, cut)) for cut in range(5)]
        for size in (32, 224)
    }
    assert at[32] == [(64, 64), (64, 64), (16, 128), (4, 256), (1, 512)]
    assert at[224] == [(3136, 64), (3136, 64), (784, 128), (196, 256), (49, 512)]
    # what the client of the paper's split point holds: stem and two stages
    assert count(client_skeleton(config, 2).canonical_parameters()) == 683_072


def test_what_is_trained():
    client = client_skeleton(architecture("resnet-18"), 1)
    full, blocks = (trainable_parameters(client, kind) for kind in ("full", "blocks"))
    stem = {"convolution.weight", "normalization.weight", "normalization.bias"}
    assert full.keys() - blocks.keys() == {f"resnet.embedder.embedder.{name}" for name in stem}
    assert "resnet.encoder.stages.0.layers.0.layer.0.normalization.weight" in blocks


@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_one_by_one_have_the_gradient_of_back_propagation(saved, name):
    client, _ = halves(saved(name)[0], 2)
    h = client(PIXELS, torch.ones(3, 1))
    gradient = torch.randn(h.shape, generator=torch.Generator().manual_seed(2))
    cotangent = Cotangent(gradient, torch.empty(3, 0), 1.0)
    batch = Batch(PIXELS, torch.ones(h.shape[:2], dtype=torch.int64), torch.zeros(3))
    own, exact = both(recomputed_gradients, client, batch, cotangent)
    assert own.keys() == exact.keys()
    for key, expected in exact.items():
        assert (own[key] - expected).abs().max() <= 1e-4 * expected.abs().max(), key


def test_residual_feedback_trains_the_blocks_of_a_vit(saved):
    client, _ = halves(saved("vit")[0], 2)
    parameters = client.canonical_parameters()
    trained = fed_back(client, parameters)
    assert len(trained) == 2 * 16  # W and b of four in the attention, two norms, the MLP's two
    batch = Batch(PIXELS, torch.ones(3, 17, dtype=torch.int64), torch.zeros(3))
    gradient = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(2))
    h = client(PIXELS, torch.ones(3, 17))
    exact = torch.autograd.grad(h, [parameters[n] for n in trained], gradient)
    chosen = {name: parameters[name] for name in trained}
    own = dict(residual_gradients(client, chosen, batch, Cotangent(gradient, torch.empty(0), 1.0)))
    assert own.keys() == set(trained)
    for name, expected in zip(trained, exact, strict=True):
        if "layers.1." in name:  # the last block's is exact
            assert torch.allclose(own[name], expected, rtol=1e-4, atol=1e-4), name


def test_the_rules_give_the_gradient_of_a_vit(saved):
    client, _ = halves(saved("vit")[0], 2)
    gradient = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(2))
    batch = Batch(PIXELS, torch.ones(3, 17, dtype=torch.int64), torch.zeros(3))
    own, exact = both(exact_gradients, client, batch, Cotangent(gradient, torch.empty(0), 1.0))
    assert own.keys() == exact.keys()
    for key, expected in exact.items():
        if not key.endswith("k_proj.bias"):  # softmax makes its gradient zero
            assert (own[key] - expected).abs().max() <= 1e-4 * expected.abs().max(), key


def test_what_a_resnet_cannot_is_said_in_a_line(saved):
    client, _ = halves(saved("resnet")[0], 2)
    with pytest.raises(ConfigError, match="use recompute"):
        fed_back(client, client.canonical_parameters())
    odd = architecture("vit-tiny")
    odd.image_size = [16, 32]
    with pytest.raises(ConfigError, match=r"must be square, this model's are \[16, 32\]"):
        IMAGE_FAMILIES["vit"].image_size(odd)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_client_in_16_bits(saved, name):
    directory, model = saved(name)
    client, server = halves(directory, 2, torch.bfloat16)
    assert {t.dtype for t in (*client.parameters(), *client.stored_buffers().values())} <= {
        torch.bfloat16,
        torch.int64,
    }
    with torch.no_grad():
        whole = model(PIXELS).logits
    assert torch.allclose(logits_of(client, server), whole, rtol=0.1, atol=0.1)
