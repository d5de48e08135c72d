"""Students of 1, 4 and 8 channels: the sparse engine, the pixel objective, what a checkpoint says, and what is refused."""

import pytest
import torch

from hgkd.distillers import MAEPretraining, MaskedDistiller
from hgkd.errors import code_of
from hgkd.networks.backbones import build_backbone
from hgkd.networks.classifier import ImageClassifier
from hgkd.networks.encoder import build_encoder
from hgkd.networks.mae import patchify
from hgkd.pixels import channels_of, pixel_statistics
from hgkd.sparse import measure_parity
from hgkd.students import MaskedViT, SparseUNet
from hgkd.weights.run_file import EncoderSpec

CHANNELS = (1, 4, 8)
VIT = dict(embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, image_size=(64, 64))


def statistics(channels):
    return [round(0.1 + 0.05 * c, 2) for c in range(channels)], [round(0.2 + 0.01 * c, 2) for c in range(channels)]


def small(channels, **options):
    return SparseUNet("test_resnet", decoder_width=32, in_chans=channels, normalize=statistics(channels), **options)


@pytest.mark.parametrize("channels", CHANNELS)
def test_a_students_sparse_features_are_those_of_its_dense_network(channels):
    student = small(channels).eval()
    images = torch.rand(2, channels, 64, 64)
    assert student.in_chans == channels
    sparse = student(images, None).features[-1].to_dense()
    mean, std = (torch.tensor(part).view(1, -1, 1, 1) for part in statistics(channels))
    torch.testing.assert_close(sparse, student.encoder.forward_features((images - mean) / std), rtol=1e-4, atol=1e-5)
    hidden = torch.tensor([[True, False], [True, True]]).expand(2, 2, 2)
    other = images.clone()
    other[:, :, :32, 32:] = 0.3  # what is hidden changes nothing
    for a, b in zip(student(images, hidden).features, student(other, hidden).features, strict=True):
        assert torch.equal(a.to_dense(), b.to_dense())


@pytest.mark.parametrize("channels", CHANNELS)
def test_the_sparse_engine_is_exact(channels):
    assert measure_parity(build_encoder("test_resnet", in_chans=channels)).worst < 1e-8


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_the_pixel_objective_rebuilds_all_channels(channels, kind):
    mean, std = statistics(channels)
    cnn = dict(type="SparseUNet", encoder="test_resnet", decoder_width=32, in_chans=channels, normalize=(mean, std))
    vit = dict(type="MaskedViT", arch=VIT, cell=32, in_chans=channels, mean=mean, std=std)
    model = MaskedDistiller(
        student=cnn if kind == "cnn" else vit,
        objectives=dict(pixels=dict(type="PixelReconstruction")),
        mask=dict(type="RandomMask", mask_ratio=0.5),
        image_size=64,
    )
    images = torch.rand(2, channels, 64, 64)
    loss = model(images, mode="loss")["pixels_reconstruction_loss"]
    loss.backward()
    stem = model.student.encoder.conv1[0] if kind == "cnn" else model.student.network.patch_embed.proj
    assert stem.weight.grad.abs().sum((0, 2, 3)).min() > 0  # of every channel
    out = model.student(images, None)
    rebuilt = model.objectives["pixels"].reconstruct(out, out.layout)
    assert rebuilt.shape == images.shape
    assert torch.equal(rebuilt, images)  # all is visible


def test_a_mae_of_four_channels_predicts_all_of_them():
    mean, std = statistics(4)
    model = MAEPretraining(VIT, 64, in_chans=4, mean=mean, std=std, norm_pix=False)
    images = torch.rand(2, 4, 64, 64)
    predicted = model.network.predict_pixels(model.network.encode(model.normalise(images)))
    assert predicted.shape == patchify(images, 16).shape == (2, 16, 16 * 16 * 4)
    model(images, mode="loss")["mae_loss"].backward()
    assert model.network.patch_embed.proj.weight.grad.abs().sum((0, 2, 3)).min() > 0


@pytest.mark.parametrize("channels", CHANNELS)
def test_a_checkpoint_says_channels_and_statistics(channels):
    mean, std = statistics(channels)
    spec = EncoderSpec.parse({**small(channels).description(), "format": 1}, "here")
    assert (spec.kwargs, spec.pixels) == ({"in_chans": channels}, (tuple(mean), tuple(std)))
    network = build_backbone(spec)
    assert channels_of(network) == channels
    assert pixel_statistics(network) == (tuple(mean), tuple(std))
    again = SparseUNet(decoder_width=32, **spec.to_student())
    assert again.mean.flatten().tolist() == pytest.approx(mean)


def test_own_statistics_of_rgb_images_are_noted_too():
    student = SparseUNet("test_resnet", decoder_width=32, normalize=([0.5] * 3, [0.25] * 3))
    assert student.encoder_spec["pixels"] == [[0.5] * 3, [0.25] * 3]
    assert "pixels" not in SparseUNet("test_resnet", decoder_width=32).encoder_spec


def test_a_classifier_of_four_channels():
    classifier = ImageClassifier("test_resnet", 3, 64, normalize=statistics(4), in_chans=4)
    assert classifier.feature_shape(64)[0] > 0
    again = ImageClassifier.from_spec(classifier.spec)
    assert again.predict(again.normalise(torch.rand(2, 4, 64, 64))).shape == (2, 3)


@pytest.mark.parametrize(
    "build",
    [
        lambda: SparseUNet("test_resnet", in_chans=4),
        lambda: SparseUNet("test_resnet", encoder_kwargs=dict(in_chans=4)),
        lambda: MaskedViT(VIT, in_chans=4),
        lambda: MAEPretraining(VIT, 64, in_chans=4),
        lambda: ImageClassifier("test_resnet", 3, 64, in_chans=4),
    ],
)
def test_other_channels_than_rgb_need_their_statistics(build):
    told = r"in_chans=4 needs the mean and standard deviation.*hgkd doctor pixels FOLDER"
    with pytest.raises(ValueError, match=told) as error:
        build()
    assert code_of(error.value) == "channels-without-statistics"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(in_chans=4, normalize=statistics(3)), "normalize: mean must be 4 finite numbers, one for each channel"),
        (dict(in_chans=4, normalize=0.5), "means and the standard deviations of 4 channels"),
        (dict(in_chans=0), "model.student.in_chans is the number of channels of the images, a whole number from 1, got 0"),
        (dict(in_chans=4, encoder_kwargs=dict(in_chans=8)), "in_chans=4 and encoder_kwargs.in_chans=8 of the student differ"),
    ],
)
def test_channels_that_do_not_fit(options, told):
    with pytest.raises(ValueError, match=told):
        SparseUNet("test_resnet", **options)


def test_a_file_of_other_channels_is_refused_with_the_numbers(tmp_path):
    torch.save(build_encoder("test_resnet").state_dict(), tmp_path / "rgb.pth")
    with pytest.raises(ValueError, match=r"it has .* of 3 channels, the network .* of 4 channels"):
        small(4, encoder_checkpoint=tmp_path / "rgb.pth")
