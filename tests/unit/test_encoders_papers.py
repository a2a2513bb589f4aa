"""The encoders of Symile-M3 and Symile-MIMIC: what is published, at tiny sizes and with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from symile_dist.encoders.batch_norm import BatchNorm, convert_batch_norms
from symile_dist.encoders.features import FeatureEncoder
from symile_dist.encoders.recompute import Recomputed, compile_encoder, recompute, recompute_parts
from symile_dist.encoders.resnet import BLOCKS, Block, ResNet
from symile_dist.encoders.xlm_roberta import XLMRobertaEncoder
from symile_dist.hub import fetch_file, unavailable
from symile_dist.registry import ENCODERS, build
from symile_dist.types import Padded
from tests.pretrained import save_clip, save_text

DIM = 8
PAD, MISSING = 1, 50


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, width 16, vocabulary of 50. Read only."""
    return save_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# -- features, some of them missing -----------------------------------------------------------------------------------


def test_a_missing_feature_is_filled_and_flagged(tmp_path: Path) -> None:
    mean = np.arange(4, dtype=np.float64)
    np.save(tmp_path / "mean.npy", mean)
    encoder = build(
        "features", {"input_dim": 4, "fill": str(tmp_path / "mean.npy")}, ENCODERS, "encoder", embedding_dim=DIM
    )
    features, present = torch.randn(3, 4), torch.tensor([True, False, True])
    flags = encoder.indicator.weight
    rows = [
        torch.cat([features[0], flags[0]]),
        torch.cat([torch.from_numpy(mean).float(), flags[1]]),
        torch.cat([features[2], flags[0]]),
    ]
    expected = torch.stack(rows) @ encoder.projection.weight.T + encoder.projection.bias
    assert torch.allclose(encoder(features, present), expected, atol=1e-6)
    assert torch.equal(encoder(features), encoder(features, torch.ones(3, dtype=torch.bool)))
    assert encoder.projection.weight.shape == (DIM, 8), "2 h -> D"
    placeholder = features.clone()
    placeholder[1] = 99
    assert torch.equal(encoder(placeholder, present), encoder(features, present)), "what stood there does not matter"
    (tmp_path / "mean.npy").unlink()
    other = FeatureEncoder(DIM, 4)
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(features, present), encoder(features, present)), "the fill is kept with the weights"


def test_a_learned_fill_is_trained() -> None:
    encoder = FeatureEncoder(DIM, 4, "learned")
    encoder(torch.randn(2, 4), torch.tensor([True, False])).square().sum().backward()
    assert (
        isinstance(encoder.fill, nn.Parameter) and encoder.fill.grad is not None and encoder.fill.grad.abs().sum() > 0
    )
    encoder.zero_grad()
    encoder(torch.randn(2, 4), torch.tensor([True, True])).square().sum().backward()
    assert encoder.fill.grad is None or not encoder.fill.grad.any()
    with pytest.raises(TypeError, match="FeatureEncoder"):
        encoder(Padded(torch.ones(1, 4), torch.tensor([4])))
    with pytest.raises(ValueError, match="a sample has 3 values, input_dim is 4"):
        encoder(torch.ones(1, 3))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"mean\.npy: a \.npy file of \(4,\) numbers is needed \(symile-dist shards mean.*No such file"),
        (np.zeros((4, 4)), r"it holds \(4, 4\)"),
        (np.array([1.0, 2.0, np.nan, 3.0]), "holds NaN"),
        (np.array([1.0, 2.0, 1e300, 3.0]), "float32 cannot hold"),
        (np.array(["a", "b", "c", "d"]), "is needed"),
        (np.array([{}, 1, 2, 3], dtype=object), "is needed"),
    ],
)
def test_a_fill_that_is_none(tmp_path: Path, content: np.ndarray | None, words: str) -> None:
    path = tmp_path / "mean.npy"
    if content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(ValueError, match=words):
        FeatureEncoder(DIM, 4, str(path))
    with pytest.raises(ValueError, match=words):
        FeatureEncoder.check(input_dim=4, fill=str(path))


# -- XLM-R ------------------------------------------------------------------------------------------------------------


def ids_of(*texts: list[int], length: int) -> Tensor:
    rows = [[0, *words, 2] for words in texts]
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])


def published(encoder: XLMRobertaEncoder, ids: Tensor) -> Tensor:
    """Embeddings and first layer with the additive mask of the published code; per-token map; mean over all tokens."""
    model = encoder.model
    mask = (ids != PAD)[:, None, None, :].float()
    hidden = model.embeddings(input_ids=ids)
    layer = model.encoder.layer[0]
    emitted = layer(hidden, attention_mask=(1.0 - mask) * torch.finfo(torch.float32).min)
    tokens = emitted[0] if isinstance(emitted, tuple) else emitted
    return encoder.projection(tokens).mean(1)


def test_xlm_roberta_is_the_published_encoder(text: Path) -> None:
    encoder = XLMRobertaEncoder(DIM, str(text)).eval()
    assert len(encoder.model.encoder.layer) == 1, "of two layers the first"
    ids = ids_of([5, 6, 7], [8], length=9)
    assert torch.allclose(encoder(ids), published(encoder, ids), atol=1e-5)
    other = ids.clone()
    other[1, 1] = 9
    assert not torch.allclose(encoder(ids)[1], encoder(other)[1], atol=1e-3)
    whole = build("pretrained", {"model": str(text)}, ENCODERS, "encoder", embedding_dim=DIM)
    weights = whole.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in encoder.model.state_dict().items())
    encoder(ids).square().sum().backward()
    unused = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert not unused, "embeddings and layer are fine-tuned"


def test_a_text_does_not_depend_on_how_far_its_batch_is_padded(text: Path) -> None:
    encoder = XLMRobertaEncoder(DIM, str(text), max_length=9).eval()
    short = Padded(torch.tensor([[0, 5, 2], [0, 6, 2]]), torch.tensor([3, 3]))
    long = Padded(torch.tensor([[0, 5, 2, 0, 0], [0, 6, 7, 8, 2]]), torch.tensor([3, 5]))
    assert torch.allclose(encoder(short)[0], encoder(long)[0], atol=1e-6)
    assert torch.allclose(encoder(short), encoder(ids_of([5], [6], length=9)), atol=1e-6)
    assert torch.allclose(encoder(short), encoder(ids_of([5], [6], length=4)), atol=1e-6), "padded to max_length"
    unpadded = encoder(ids_of([5], length=3))
    encoder.max_length = None
    assert not torch.allclose(encoder(ids_of([5], length=3)), unpadded, atol=1e-3), "the mean counts padding"
    with pytest.raises(ValueError, match="need max_length"):
        encoder(short)
    encoder.max_length = 4
    with pytest.raises(ValueError, match="texts of 5 tokens, max_length is 4"):
        encoder(long)
    for wrong in (torch.randn(2, 3), torch.ones(2, 3, 3, dtype=torch.int64)):
        with pytest.raises(TypeError, match="token ids"):
            encoder(wrong)
    with pytest.raises(ValueError, match="an id is 50, the encoder knows 0 to 49"):
        encoder(torch.full((2, 4), 50))
    encoder.max_length = None
    for length in (2, encoder.longest + 1):
        with pytest.raises(ValueError, match=f"texts of {length} tokens, it knows 3 to {encoder.longest}"):
            encoder(torch.full((2, length), 5))
    with pytest.raises(ValueError, match="layers should be 1 or more"):
        XLMRobertaEncoder(DIM, str(text), layers=0)


def test_a_missing_text_is_the_missing_token(text: Path) -> None:
    encoder = XLMRobertaEncoder(DIM, str(text), missing_token=True).eval()
    assert encoder.model.embeddings.word_embeddings.weight.shape == (51, 16)
    plain = XLMRobertaEncoder(DIM, str(text))
    assert torch.equal(
        encoder.model.embeddings.word_embeddings.weight[:50], plain.model.embeddings.word_embeddings.weight
    )
    ids = ids_of([5, 6], [7, 8], length=6)
    ids[1] = 0  # what the loader puts there
    emitted = encoder(ids, torch.tensor([True, False]))
    expected = encoder(ids_of([5, 6], [MISSING], length=6))
    assert torch.allclose(emitted, expected, atol=1e-6)
    encoder(ids, torch.tensor([True, False]))[1].sum().backward()
    gradient = encoder.model.embeddings.word_embeddings.weight.grad
    assert gradient[MISSING].abs().sum() > 0 and not gradient[5].any()


def test_mistakes_about_xlm_roberta(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is of the type clip"):
        XLMRobertaEncoder(DIM, str(save_clip(tmp_path / "clip")))
    with pytest.raises(ValueError, match="lacks weights"):
        XLMRobertaEncoder(DIM, str(text), layers=3)
    with pytest.raises(ValueError, match="max_length should be 3 to 38"):
        XLMRobertaEncoder(DIM, str(text), max_length=39)
    for check in (XLMRobertaEncoder.check, XLMRobertaEncoder):
        with pytest.raises(ValueError, match="no such folder; a model that save_pretrained wrote is needed there"):
            check(embedding_dim=DIM, model=str(tmp_path / "nowhere"))
    XLMRobertaEncoder.check(model=str(text))


# -- ResNet -----------------------------------------------------------------------------------------------------------


def of_transformers(depth: int, width: int) -> nn.Module:
    """transformers' own network of the same shape, with weights drawn anew."""
    from transformers import ResNetConfig, ResNetModel

    bottleneck = depth >= 50
    config = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[width * 2**stage * (4 if bottleneck else 1) for stage in range(4)],
        depths=list(BLOCKS[depth]),
        layer_type="bottleneck" if bottleneck else "basic",
    )
    return ResNetModel(config)


def translated(weights: dict[str, Tensor], bottleneck: bool) -> dict[str, Tensor]:
    """From transformers' names to torchvision's."""
    found = {}
    for name, tensor in weights.items():
        name = name.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
        name = name.replace("encoder.stages.", "layer").replace(".layers.", ".")
        if name.startswith("layer"):
            head, _, rest = name.partition(".")
            name = f"layer{int(head[5:]) + 1}.{rest}"
        name = name.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
        for number in range(3):
            name = name.replace(f".layer.{number}.convolution", f".conv{number + 1}")
            name = name.replace(f".layer.{number}.normalization", f".bn{number + 1}")
        found[name] = tensor
    return found


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_is_that_of_transformers(depth: int, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    theirs = of_transformers(depth, 4)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.3)
    weights = {name: tensor.contiguous() for name, tensor in translated(theirs.state_dict(), depth >= 50).items()}
    weights |= {"fc.weight": torch.zeros(1000, 3), "fc.bias": torch.zeros(1000)}
    save_file(weights, tmp_path / "model.safetensors")
    options = {"depth": depth, "width": 4, "weights": str(tmp_path)}
    ours = build("resnet", options, ENCODERS, "encoder", embedding_dim=DIM)
    images = torch.randn(3, 3, 40, 40)
    for mode in (False, True):
        theirs.train(mode), ours.train(mode)
        expected = ours.fc(theirs(images).pooler_output.flatten(1))
        assert torch.allclose(ours(images), expected, atol=1e-4), f"training {mode}"
    # The same statistics after the batch.
    after = translated(theirs.state_dict(), depth >= 50)
    own = ours.state_dict()
    assert all(torch.allclose(own[name], tensor, atol=1e-5) for name, tensor in after.items())


def test_resnets_have_the_published_sizes() -> None:
    """Of the whole networks without a classifier, as their papers' code counts them."""
    for depth, million in ((18, 11.18), (50, 23.51)):
        with torch.device("meta"):
            network = ResNet(DIM, depth)
        trunk = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("fc."))
        assert trunk / 1e6 == pytest.approx(million, abs=0.01)


def test_an_electrocardiogram_is_an_image_of_one_channel(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    network = ResNet(DIM, 18, channels=1, width=4).eval()
    assert network.conv1.weight.shape == (4, 1, 7, 7)
    assert network(torch.randn(2, 1, 100, 12)).shape == (2, DIM)
    with pytest.raises(ValueError, match=r"not \(n, 1, H, W\)"):
        network(torch.randn(2, 3, 100, 12))
    with pytest.raises(TypeError, match="ResNet"):
        network(Padded(torch.ones(1, 4), torch.tensor([4])))
    colours = ResNet(DIM, 18, channels=3, width=4).state_dict()
    save_file(colours, tmp_path / "colours.safetensors")
    loaded = ResNet(DIM, 18, channels=1, width=4, weights=str(tmp_path / "colours.safetensors"))
    own = loaded.state_dict()
    assert all(torch.equal(own[n], t) for n, t in colours.items() if not n.startswith(("fc.", "conv1.")))


def test_weights_that_are_not_of_this_network(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def refused(words: str, **options: object) -> None:
        with pytest.raises(ValueError, match=words):
            build("resnet", {"width": 4, **options}, ENCODERS, "encoder", embedding_dim=DIM)

    refused("depth must be one of 18, 34, 50, 101, 152, not 20", depth=20)
    refused("is a pickle, which runs code", weights="resnet50.pth")
    refused(r"model\.safetensors: no such file", weights=str(tmp_path))
    save_file(ResNet(DIM, 34, width=4).state_dict(), tmp_path / "model.safetensors")
    refused(r"is not of this network: 'layer1\.2.*names as torchvision's", depth=18, weights=str(tmp_path))
    refused("is not of this network", depth=101, weights=str(tmp_path))
    with pytest.raises(ValueError, match="is not of this network"):
        ResNet.check(depth=18, width=4, weights=str(tmp_path))
    ResNet.check(depth=34, width=4, channels=1, weights=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    refused("cannot be read as safetensors", depth=34, weights=str(tmp_path))


def test_what_is_needed_where_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def unreachable(*args: object, **options: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(
        ValueError, match=r"couldn't connect.*Needed is huggingface\.co/timm/resnet50\.tv2_in1k.*hf download"
    ):
        ResNet.check(weights="timm/resnet50.tv2_in1k")
    with pytest.raises(ValueError, match="cannot be had: OSError"):
        fetch_file("some/model", "model.safetensors", "main")
    assert "hf download" not in str(unavailable(str(tmp_path), "cannot be loaded", OSError("damaged")))


# -- batch normalisation, recomputation -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_our_batch_normalisation_is_torch_s(kind: type[nn.Module], options: dict[str, object]) -> None:
    theirs = nn.Sequential(kind(3, **options))
    ours = nn.Sequential(kind(3, **options))
    assert convert_batch_norms(ours) == 1 and isinstance(ours[0], BatchNorm)
    shape = (6, 3, *{nn.BatchNorm1d: (), nn.BatchNorm2d: (4, 4), nn.BatchNorm3d: (2, 2, 2)}[kind])
    for step in range(4):
        values = 3 + torch.randn(shape)
        theirs.train(step < 3), ours.train(step < 3)
        assert torch.equal(ours(values), theirs(values)), f"step {step}"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


def test_statistics_stay_float32_beside_weights_of_lower_precision() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3))
    convert_batch_norms(network)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    for mode in (True, False):
        assert network.train(mode)(torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert network[0].running_mean.dtype == torch.float32


@pytest.mark.parametrize("bad", [1e30, float("inf"), float("nan")])
def test_a_batch_that_is_not_finite_leaves_the_running_statistics(bad: float) -> None:
    """1e30 is finite, its variance is not: evaluation would see zeros from then on."""
    network = nn.Sequential(nn.BatchNorm2d(3))
    convert_batch_norms(network)
    network(torch.randn(4, 3, 2, 2))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    values = torch.randn(4, 3, 2, 2)
    values[0, 1, 0, 0] = bad
    network(values)
    after = network.state_dict()
    for name in ("0.running_mean", "0.running_var"):
        same = after[name] == before[name]
        assert same.tolist() == [False, True, False], "the other channels go on"
        assert after[name].isfinite().all()


def test_recomputed_parts_give_the_same_gradients_and_count_once() -> None:
    networks = []
    for recomputed in (False, True):
        torch.manual_seed(1)
        network = nn.Sequential(ResNet(DIM, 18, channels=1, width=4), nn.Dropout(0.5))
        convert_batch_norms(network)
        if recomputed:
            assert recompute_parts(network[0]), "a ResNet names its blocks"
            blocks = [block for block in network.modules() if isinstance(block, Block)]
            assert all(isinstance(block.forward, Recomputed) for block in blocks) and len(blocks) == 8
        networks.append(network)
    images = torch.randn(4, 1, 20, 12)
    results = []
    for number, network in enumerate(networks):
        torch.manual_seed(2)
        whole = recompute(network, network, images) if number else network(images)
        whole.square().sum().backward()
        results.append((whole.detach(), [p.grad for p in network.parameters()], network.state_dict()))
    (plain, gradients, state), (other, others, other_state) = results
    assert torch.equal(plain, other), "dropout is replayed"
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, others, strict=True))
    assert all(torch.equal(tensor, other_state[name]) for name, tensor in state.items()), "a batch counts once"
    assert int(other_state["0.bn1.num_batches_tracked"]) == 1
    assert not recompute_parts(nn.Linear(1, 1)), "names no parts: it is computed again as a whole"


def test_what_is_computed_twice_is_compiled_part_by_part() -> None:
    def compiled(function: object) -> bool:
        return hasattr(function, "_torchdynamo_orig_callable")

    whole, parts = ResNet(DIM, 18, width=4), ResNet(DIM, 18, width=4)
    recompute_parts(parts)
    compile_encoder(whole), compile_encoder(parts)
    assert compiled(whole._compiled_call_impl) and not compiled(parts._compiled_call_impl)
    forwards = [block.forward for block in parts.modules() if isinstance(block, Block)]
    assert all(isinstance(forward, Recomputed) and compiled(forward.function) for forward in forwards)


def test_recomputation_keeps_less() -> None:
    """The tensors that autograd keeps, by their size."""

    def kept(recomputed: bool) -> int:
        network = ResNet(DIM, 18, channels=1, width=4)
        if recomputed:
            recompute_parts(network)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(torch.randn(8, 1, 64, 64))
        return sum(sizes.values())

    assert kept(True) < 0.6 * kept(False)
