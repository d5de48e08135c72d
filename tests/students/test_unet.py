"""The sparse UNet: what it sees, that its backends agree, what trains, geometry and refusals."""

import pickle
from typing import Any

import pytest
import timm
import torch
from refusals import refused
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from visible_rectangles import crops_of, rectangles

from hgkd.errors import NoSparseRuleError
from hgkd.networks.encoder import encoder_features
from hgkd.registry import MODELS
from hgkd.sparse import CellLayout, MaskedTensor, PackedTensor, SparseTensor, sparsify
from hgkd.students import SparseUNet, build_encoder, encoder_levels, unet
from hgkd.students.unet import DecoderStage, Densify

SMALL: dict[str, Any] = {"decoder_width": 16, "min_decoder_width": 4}
# two images of 2 x 3 cells with different numbers of visible ones
VISIBLE = torch.tensor([[[True, False, True], [False, True, False]], [[False, False, True], [False, False, False]]])


def make(encoder: str = "test_resnet", **options: Any) -> SparseUNet:
    torch.manual_seed(1)
    return SparseUNet(encoder, **{**SMALL, **options})


def images(student: SparseUNet, batch: int = 2, h: int = 2, w: int = 3) -> Tensor:
    return torch.rand(batch, 3, h * student.cell, w * student.cell)


def pixels(visible: Tensor, cell: int) -> Tensor:
    return visible.repeat_interleave(cell, 1).repeat_interleave(cell, 2).unsqueeze(1)


@pytest.mark.parametrize("encoder", ["test_resnet", "test_convnext", "test_efficientnet", "test_byobnet"])
def test_masked_pixels_change_nothing(encoder: str) -> None:
    student = make(encoder)
    x = images(student)
    other = torch.where(pixels(VISIBLE, student.cell), x, torch.rand_like(x))
    torch.testing.assert_close(student(x, VISIBLE).decoded, student(other, VISIBLE).decoded)


@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        ("test_resnet", {}),
        ("test_resnet", {"out_stride": 4}),
        ("test_convnext", {"out_stride": 8}),
        ("resnet18", {"stem": "cifar", "out_stride": 2}),
    ],
)
def test_backends_agree_in_values_and_gradients(encoder: str, options: dict[str, Any]) -> None:
    gather = make(encoder, backend="gather", **options).double()
    masked = make(encoder, backend="masked", **options).double()
    masked.load_state_dict(gather.state_dict())
    x = images(gather).double()
    results = []
    for student in (gather, masked):
        out = student(x, VISIBLE)
        (out.decoded * torch.linspace(-1, 1, out.decoded.numel()).view_as(out.decoded)).sum().backward()
        results.append(out)
    torch.testing.assert_close(results[0].decoded, results[1].decoded)
    for a, b in zip(results[0].features, results[1].features, strict=True):
        torch.testing.assert_close(a.to_dense(), b.to_dense())
    gradients = dict(masked.named_parameters())
    for name, parameter in gather.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(gather.state_dict(), masked.state_dict())  # running statistics


@pytest.mark.parametrize("encoder", ["test_resnet", "test_convnext"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_hidden_equals_the_dense_encoder(encoder: str, training: bool) -> None:
    student = make(encoder).train(training)
    plain = build_encoder(encoder).train(training)
    plain.load_state_dict(student.encoder.state_dict())
    x = images(student)
    expected = encoder_features(plain, student.normalise(x), encoder_levels(plain))
    state = {k: v.clone() for k, v in student.state_dict().items()}
    for visible in (None, torch.ones_like(VISIBLE)):
        student.load_state_dict(state)
        out = student(x, visible)
        assert out.layout.all_visible
        for level, dense in zip(out.features, expected, strict=True):
            torch.testing.assert_close(level.to_dense(), dense, atol=1e-4, rtol=1e-4)
    student.load_state_dict(state)
    for level, dense in zip(student.dense_features(x), expected, strict=True):
        torch.testing.assert_close(level, dense)


@pytest.mark.parametrize("encoder", ["test_resnet", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize(
    "options", [{}, {"out_stride": 32}, {"out_stride": 1}, {"skips": "last"}, {"out_stride": 4, "cell": 64}]
)
def test_every_trained_parameter_has_a_gradient(encoder: str, options: dict[str, Any]) -> None:
    # timm starts the last norm of a residual branch at 0, which leaves the rest of the branch without gradient at first
    kwargs = {"zero_init_last": False} if "resnet" in encoder else {}
    student = make(encoder, encoder_kwargs=kwargs, **options)
    out = student(images(student), VISIBLE)
    (out.decoded * torch.randn_like(out.decoded)).sum().backward()
    without = [k for k, p in student.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # a convolution before a BatchNorm has no gradient left in its bias
    without = [k for k in without if not k.endswith("bias")]
    assert without == []
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


def test_every_trained_parameter_takes_part_with_nothing_hidden() -> None:
    student = make()
    student(images(student)).decoded.sum().backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


def test_parameters_that_no_level_reads_are_frozen_and_named() -> None:
    student = make("test_convnext")
    assert student.frozen == ["head.norm.weight", "head.norm.bias"]
    frozen = [k for k, p in student.named_parameters() if not p.requires_grad]
    assert frozen == ["encoder.head.norm.weight", "encoder.head.norm.bias"]


@pytest.mark.parametrize("out_stride", [32, 16])
def test_hidden_places_learn_of_visible_ones(out_stride: int) -> None:
    student = make(out_stride=out_stride).eval()
    x = images(student, 1)
    visible = VISIBLE[:1]
    x.requires_grad_()
    side = student.cell // out_stride
    student(x, visible).decoded[:, :, :side, side : 2 * side].square().sum().backward()  # the hidden cell (0, 1)
    assert x.grad.abs().sum(1)[0, : student.cell, : student.cell].sum() > 0
    assert x.grad[0, :, : student.cell, student.cell : 2 * student.cell].abs().sum() == 0


def test_output_and_geometry() -> None:
    student = make("test_resnet", out_stride=8)
    assert student.feature_strides == (4, 8, 16, 32)
    assert student.feature_channels == (32, 48, 192, 96)
    assert (student.cell, student.out_stride, student.decoded_channels) == (32, 8, 4)
    assert list(student.densify) == ["8", "16", "32"]
    x = images(student)
    out = student(x, VISIBLE)
    assert out.decoded.shape == (2, 4, 8, 12)
    assert out.images is x
    assert isinstance(out.layout, CellLayout)
    assert out.layout.visible.equal(VISIBLE)
    assert all(isinstance(f, SparseTensor) and f.cells is out.layout for f in out.features)
    assert [f.stride for f in out.features] == [4, 8, 16, 32]


def test_last_level_only() -> None:
    assert list(make(skips="last").densify) == ["32"]


@pytest.mark.parametrize(("out_stride", "widths"), [(32, [16]), (16, [16, 8]), (8, [16, 8, 4]), (1, [16, 8, 4, 4, 4, 4])])
def test_decoder_widths_halve_down_to_the_floor(out_stride: int, widths: list[int]) -> None:
    student = make(out_stride=out_stride)
    assert [stage.convolutions[0].out_channels for stage in student.decoder.values()] == widths
    assert student.decoded_channels == widths[-1]


def test_a_level_is_added_at_its_own_scale() -> None:
    stage = DecoderStage(4, 2).eval()
    x, level = torch.randn(1, 4, 3, 3), torch.randn(1, 2, 6, 6)
    torch.testing.assert_close(stage(x, level), stage.convolutions(stage.upsample(x) + level))


def test_densify_by_hand() -> None:
    densify = Densify(1, 1, 1)
    with torch.no_grad():
        densify.projection.weight.fill_(2.0)
        densify.projection.bias.fill_(0.5)
        densify.mask_token.fill_(7.0)
    layout = CellLayout(torch.tensor([[[True, False, True]]]), 4)
    for kind in (PackedTensor, MaskedTensor):
        level = kind.pack(torch.tensor([[[[1.0, 100.0, 3.0]]]]), layout)
        # visible values 1 and 3: mean 2, variance 1 -> -1 and 1
        expected = torch.tensor([-2.0 + 0.5, 14.0 + 0.5, 2.0 + 0.5])
        torch.testing.assert_close(densify.train()(level).flatten(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        ("test_resnet", {}),
        ("test_resnet", {"out_stride": 4}),
        ("test_resnet", {"skips": "last"}),
        ("test_convnext", {"out_stride": 8}),
        ("test_resnet", {"backend": "masked"}),
    ],
)
def test_a_decoder_of_the_visible_rectangle_is_the_student_of_the_crop(encoder: str, options: dict[str, Any]) -> None:
    """Values, gradients and running statistics are those of the same student that is given the crops as its whole images."""
    student, of_crops = make(encoder, **options).double(), make(encoder, **options).double()
    of_crops.load_state_dict(student.state_dict())
    visible, x = rectangles(2, 2, (3, 3), (1, 0), (0, 1)), images(student, h=3, w=3).double()
    out, expected = student(x, visible, decode="visible"), of_crops(crops_of(x, visible))
    assert list(out.pyramid) == list(expected.pyramid)
    torch.testing.assert_close(out.decoded, out.pyramid[student.out_stride])
    seen = {}
    for stride, whole in out.pyramid.items():
        s = student.cell // stride
        assert whole.shape == (2, student.pyramid_channels[stride], 3 * s, 3 * s)
        seen[stride] = crops_of(whole, visible)
        torch.testing.assert_close(seen[stride], expected.pyramid[stride])
        assert not whole[~pixels(visible, s).expand_as(whole)].any()
    for maps in (seen, expected.pyramid):
        torch.stack([(map * torch.linspace(-1, 1, map.numel()).view_as(map)).sum() for map in maps.values()]).sum().backward()
    gradients = dict(of_crops.named_parameters())
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(student.state_dict(), of_crops.state_dict())


def test_where_nothing_is_hidden_the_visible_places_are_all() -> None:
    student = make()
    x = images(student)
    torch.testing.assert_close(student(x, decode="visible").decoded, student(x).decoded)


def test_a_decoder_of_the_visible_rectangle_costs_what_the_crop_does() -> None:
    student = make("resnet18", decoder_width=256).eval()
    x, visible = images(student, h=4, w=4), rectangles(2, 2, (4, 4), (0, 0), (1, 1))
    counted = []
    for arguments in ((x, visible, None, None, "visible"), (x[:, :, :64, :64],)):
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            student(*arguments)
        counted.append(flops.get_total_flops())
    assert counted[1] <= counted[0] < 1.001 * counted[1]  # a little for the mask itself: which pooling windows touch it


def test_a_decoder_of_the_visible_places_needs_rectangles_and_no_other_place_is_known() -> None:
    student = make()
    with refused(ValueError, "decode-without-rectangles", "RectangleMask"):
        student(images(student), VISIBLE, decode="visible")
    with refused(ValueError, "decode-unknown", "hidden", "visible"):
        student(images(student), VISIBLE, decode="hidden")


def test_larger_cells() -> None:
    student = make(cell=64)
    assert student.prepare((128, 192)) == (2, 3)
    assert student(images(student), VISIBLE).decoded.shape == (2, 8, 8, 12)


@pytest.mark.parametrize(("size", "grid"), [(96, (3, 3)), ((64, 96), (2, 3)), ([64, 96], (2, 3))])
def test_prepare(size: Any, grid: tuple[int, int]) -> None:
    assert make().prepare(size) == grid


def test_pooled_is_the_dense_mean_of_the_last_level() -> None:
    student = make().eval()
    x = torch.rand(3, 3, 64, 96)
    plain = build_encoder("test_resnet").eval()
    plain.load_state_dict(student.encoder.state_dict())
    config = plain.pretrained_cfg
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    expected = plain((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)).mean((2, 3))
    torch.testing.assert_close(student.pooled(x), expected)


def test_in_eval_mode_a_batch_equals_its_images_one_by_one() -> None:
    student = make().eval()
    x = images(student)
    together = student(x, VISIBLE).decoded
    for i in range(2):
        alone = student(x[i : i + 1], VISIBLE[i : i + 1]).decoded
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-4)


def test_encoder_state_is_timms_own_and_the_spec_builds_it_again() -> None:
    options = {"drop_path_rate": 0.1}
    student = make(encoder_kwargs=options)
    plain = timm.create_model("test_resnet", num_classes=0, global_pool="", drop_path_rate=0.1)
    assert list(student.encoder.state_dict()) == list(plain.state_dict())
    assert options == {"drop_path_rate": 0.1}
    spec = student.encoder_spec
    again = build_encoder(spec["name"], stem=spec["stem"], **spec["kwargs"])
    again.load_state_dict(student.encoder.state_dict())
    assert not any("mean" in k.split(".")[0] for k in student.state_dict())  # constants are not saved


def test_student_starts_in_training_mode_with_fresh_statistics() -> None:
    student = make()
    assert all(module.training for module in student.modules())
    norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(int(m.num_batches_tracked) == 0 for m in norms)


def test_default_decoder_costs_clearly_less_than_the_sparse_encoder() -> None:
    student = SparseUNet("resnet18").eval()
    x = torch.rand(1, 3, 224, 224)
    with FlopCounterMode(display=False) as dense, torch.no_grad():
        student.dense_features(x)
    features = student(x).features
    with FlopCounterMode(display=False) as decoder, torch.no_grad():
        student.decode(features)
    encoder_flops = dense.get_total_flops() * 20 / 49  # SparK's 20 of 49 cells
    assert decoder.get_total_flops() < 0.35 * encoder_flops


def test_a_student_comes_back_from_a_pickle() -> None:
    student = make("test_convnext").eval()
    again = pickle.loads(pickle.dumps(student))
    x = images(student)
    assert torch.equal(again(x, VISIBLE).decoded, student(x, VISIBLE).decoded)
    assert again.description() == student.description()


def test_is_registered() -> None:
    student = MODELS.build({"type": "SparseUNet", "encoder": "test_resnet"})
    assert isinstance(student, SparseUNet)
    assert student.encoder_spec == {"name": "test_resnet", "stem": "default", "kwargs": {}}


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"encoder": "resnet81"}, ("timm-name-unknown", "encoder", "resnet81")),
        ({"encoder": "test_vit"}, ("encoder-not-hierarchical",)),
        ({"cell": 48}, ("cell-not-divided", "48", "32", "64")),
        ({"cell": 16}, ("cell-not-divided", "32", "64")),
        ({"out_stride": 64}, ("out-stride-not-reached", "out_stride", "64", "32", "1", "2", "4", "8", "16")),
        ({"out_stride": 12}, ("out-stride-not-reached", "1", "2", "4", "8", "16", "32")),
        ({"stem": "cifar", "out_stride": 16}, ("out-stride-not-reached", "1", "2", "4", "8")),
        ({"skips": "none"}, ("skips-unknown", "all", "last", "none")),
        ({"decoder_width": 2}, ("decoder-widths", "min_decoder_width", "decoder_width")),
        ({"backend": "cuda"}, ("sparse-backend-unknown", "cuda")),
    ],
)
def test_refusals(options: dict[str, Any], refusal: tuple[Any, ...]) -> None:
    encoder = options.pop("encoder", "resnet18" if "stem" in options else "test_resnet")
    with refused(ValueError, *refusal):
        make(encoder, **options)


def test_a_network_that_cannot_be_masked_is_refused_when_built() -> None:
    with refused(NoSparseRuleError, "operation-without-sparse-rule", "SplitTransposeBlock"):
        make("edgenext_xx_small")


class PooledByShape(nn.Module):
    """Squeeze-and-excite as many repositories write it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * nn.functional.avg_pool2d(x, x.size()[2:]).sigmoid()


class CountedByShape(nn.Module):
    """SimAM (PMLR 139, 2021), whose number of positions is read off the shape."""

    def forward(self, x: Tensor) -> Tensor:
        apart = (x - x.mean((2, 3), keepdim=True)).square()
        variance = apart.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
        return x * (apart / (4 * (variance + 1e-4)) + 0.5).sigmoid()


class Directions(nn.Module):
    """Unit vectors: 0 / 0 where the reference holds zeros, which is at hidden places, and no cell that is stored."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(p=2, dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("layer", "stage", "refusal"),
    [
        (Directions, "conv1", ("layer-depends-on-shape", "masked")),
        (PooledByShape, "layer2", ("resolutions-differ", "layer2.1: PooledByShape", "8", "32")),
        (PooledByShape, "layer4", ("layer-depends-on-shape", "masked")),  # its cells are one position
        (CountedByShape, "layer2", ("layer-depends-on-shape", "8", "masked")),
        (CountedByShape, "layer4", ("layer-depends-on-shape", "32", "masked")),
    ],
)
def test_a_layer_that_takes_a_cell_for_the_image_is_refused_when_built(layer, stage, refusal, monkeypatch) -> None:
    network = build_encoder("test_resnet")
    setattr(network, stage, nn.Sequential(getattr(network, stage), layer()))
    monkeypatch.setattr(unet, "build_encoder", lambda *args, **kwargs: network)
    with refused(NoSparseRuleError, *refusal):
        make()


def test_building_draws_no_number_for_its_checks(monkeypatch) -> None:
    before = make().state_dict()
    monkeypatch.setattr(SparseUNet, "_check_sparse", lambda self: None)
    after = make().state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("size", [100, (96, 100)])
def test_image_sizes_that_do_not_fit_name_the_nearest(size: Any) -> None:
    student = make()
    with refused(ValueError, "image-size-not-divided", "96 x 96"):
        student.prepare(size)
    height, width = (size, size) if isinstance(size, int) else size
    with refused(ValueError, "image-size-not-divided"):
        student(torch.rand(1, 3, height, width))


def test_mask_of_another_grid_is_refused() -> None:
    student = make()
    with refused(ValueError, "visible-shape", "(2, 2, 3)", "(2, 3, 3)"):
        student(images(student, 2, 3, 3), VISIBLE)


def test_wrong_number_of_sides_is_refused() -> None:
    with refused(ValueError, "image-size-not-a-pair"):
        make().prepare((32, 32, 32))


@pytest.mark.parametrize("name", ["tiny_vit_5m_224", "tiny_vit_11m_224"])
def test_attention_between_places_is_refused_by_the_layer_s_name(name: str) -> None:
    """It keeps a computed bias from its first forward, which torch does not copy, https://github.com/NVlabs/FasterViT/issues/24."""
    with refused(NoSparseRuleError, "padding-without-sparse-rule"):
        make(name)


def test_a_network_that_keeps_computed_tensors_is_named_when_it_cannot_be_copied() -> None:
    class Keeps(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            self.cache = {"scaled": self.weight * 2}
            return super().forward(x)

    network = nn.Sequential(nn.Conv2d(3, 4, 1), Keeps(4, 4, 1))
    sparsify(network, 8)
    network(torch.rand(1, 3, 8, 8))
    with refused(NoSparseRuleError, "layer-with-computed-tensors", "1", "Keeps", "cache"):
        sparsify(network, 8)


def test_one_visible_cell_in_the_whole_batch_is_refused_with_what_to_do() -> None:
    """torch's own message: https://github.com/open-mmlab/mmsegmentation/issues/272."""
    student = make()
    one = torch.zeros(1, 2, 3, dtype=torch.bool)
    one[0, 1, 2] = True
    x = images(student, batch=1)
    with refused(ValueError, "one-visible-cell", "batch_size", "mask_ratio"):
        student(x, one)
    student(torch.cat([x, x]), torch.cat([one, one]))  # two cells have a variance
    make(cell=2 * student.cell)(images(student, 1, 2, 4), torch.tensor([[[True, False]]]))  # so have four positions of one
    student.eval()(x, one)


def test_the_second_norm_of_a_convnext_file_is_left_aside(tmp_path: Any) -> None:
    """The official files of DINOv3's ConvNeXt hold their last norm twice, as ``norm`` and as ``norms.3``."""
    source = timm.create_model("test_convnext", num_classes=0, global_pool="")
    norm = {f"norms.3.{kind}": torch.ones(4) for kind in ("weight", "bias")}
    torch.save({**source.state_dict(), **norm}, tmp_path / "convnext.pth")
    student = make("test_convnext", encoder_checkpoint=tmp_path / "convnext.pth")
    state = student.encoder.state_dict()
    assert all(torch.equal(state[key], value) for key, value in source.state_dict().items())
