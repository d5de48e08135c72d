"""Parts as a user writes them in a module of their own beside a config; tests copy this file out of the repository.

The sections between ``# --- NAME`` lines are the snippets of docs/howto/extending.md.
"""

# --- layer rule
import torch
from timm.models import register_model
from timm.models.resnet import test_resnet
from torch import nn

from hgkd.sparse import layer_rule


class Gate(nn.Module):
    """An activation that weighs channels by their mean over the image: `view` of a whole image has no sparse rule."""

    def __init__(self, inplace=False):
        super().__init__()

    def forward(self, x):
        return x * x.mean((2, 3)).view(x.shape[0], -1, 1, 1).sigmoid()


@layer_rule(Gate)
def sparse_gate(layer, x):
    return x * x.mean((2, 3), keepdim=True).sigmoid()


@register_model
def gated_resnet(pretrained=False, **kwargs):
    """timm finds this network by its name, and so does `student=gated_resnet`."""
    return test_resnet(pretrained=pretrained, act_layer=Gate, **kwargs)


# --- masked objective
from hgkd.objectives import LossTerm, MaskedObjective  # noqa: E402
from hgkd.registry import MASKED_OBJECTIVES  # noqa: E402
from hgkd.structures import TeacherNeeds  # noqa: E402


@MASKED_OBJECTIVES.register_module()
class MeanToken(MaskedObjective):
    """The decoder's mean over the image predicts the teacher's mean token."""

    needs = TeacherNeeds(blocks=(1,))

    def _build(self, setup):  # once, before the optimiser is made
        self.head = nn.Linear(setup.student.decoded_channels, setup.teacher_info.width)

    def loss_terms(self, student_out, teacher_out, layout):
        prediction = self.head(student_out.decoded.mean((2, 3)))[:, :, None, None]
        target = teacher_out.tokens[1].mean((2, 3), keepdim=True)
        positions = torch.ones(len(target), 1, 1, dtype=torch.bool, device=target.device)
        return {"mean": LossTerm(prediction, target, positions, len(target), squared_error)}


def squared_error(prediction, target):
    return (prediction.float() - target).square().mean(1)


# --- objective with pictures
from hgkd.objectives.alignment import fit_grid  # noqa: E402
from hgkd.objectives.positions import visible_on  # noqa: E402


@MASKED_OBJECTIVES.register_module()
class VisibleTokens(MaskedObjective):
    """The decoder's map predicts the teacher's tokens at visible positions; both are shown as colours during the training."""

    needs = TeacherNeeds(blocks=(1,))
    terms = ("tokens",)

    def _build(self, setup):
        self.grid = setup.teacher_grid
        self.projector = nn.Conv2d(setup.student.decoded_channels, setup.teacher_info.width, 1)

    def predict(self, student_out, term=None):
        return self.projector(fit_grid(student_out.decoded, self.grid))

    def target_map(self, teacher_out, term=None):
        return teacher_out.tokens[1]

    def loss_terms(self, student_out, teacher_out, layout):
        positions = visible_on(layout.visible, self.grid)
        prediction, target = self.predict(student_out), self.target_map(teacher_out)
        return {"tokens": LossTerm(prediction, target, positions, positions.sum(), squared_error)}


# --- fine-tuning objective
from hgkd.objectives import FinetuningObjective  # noqa: E402
from hgkd.registry import FINETUNING_OBJECTIVES  # noqa: E402


@FINETUNING_OBJECTIVES.register_module()
class MeanFeature(FinetuningObjective):
    """The mean of the student's last map predicts that of the teacher's."""

    needs_classes = False  # a teacher of other classes will do

    def _build(self, student, teacher):  # shapes (C, h, w) of both last maps
        self.head = nn.Linear(student[0], teacher[0])

    def forward(self, student, teacher, targets):
        found = self.head(student.feature.mean((2, 3)))
        return {"mean": (found.float() - teacher.feature.mean((2, 3))).square().mean()}


# --- teacher
from hgkd.registry import MODELS  # noqa: E402
from hgkd.structures import TeacherInfo, TeacherOutput  # noqa: E402
from hgkd.teachers import Teacher  # noqa: E402


@MODELS.register_module()
class PatchTeacher(Teacher):
    """Two convolutions on patches of 16 pixels. A real one would load its weights here."""

    def __init__(self, width=12, dtype="float32"):
        super().__init__(dtype, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        self.info = TeacherInfo("patches", width=width, depth=2, patch_size=16)
        self.network = nn.ModuleList([nn.Conv2d(3, width, 16, stride=16), nn.Conv2d(width, width, 1)])
        self.freeze()  # last: no gradients, eval mode, the precision asked for

    def _forward(self, images, ids_keep, needs):  # normalised images of self.input_size
        tokens = {}
        for index, block in enumerate(self.network):
            images = block(images).relu()
            if index in needs.blocks:
                tokens[index] = self.on_grid(images.flatten(2).transpose(1, 2), None)
        return TeacherOutput(tokens=tokens, grid=self.grid)


# --- student
from hgkd.networks import build_encoder  # noqa: E402
from hgkd.pixels import IMAGENET_MEAN, IMAGENET_STD  # noqa: E402
from hgkd.sparse import CellLayout, sparsify  # noqa: E402
from hgkd.structures import StudentOutput  # noqa: E402
from hgkd.students import Student  # noqa: E402


@MODELS.register_module()
class OneLevel(Student):
    """A sparse encoder whose last level is decoded by one convolution."""

    def __init__(self, encoder="test_resnet", width=16):
        super().__init__()
        self.encoder_spec = {"name": encoder, "stem": "default", "kwargs": {}}  # export builds the encoder from it
        self.cell = self.out_stride = 32
        self.encoder = sparsify(build_encoder(encoder), self.cell)
        channels = self.encoder.num_features
        self.mask_token = nn.Parameter(torch.zeros(channels))
        self.decoder = nn.Conv2d(channels, width, 3, padding=1)
        self.decoded_channels, self.pyramid_channels = width, {self.out_stride: width}
        self.feature_channels, self.feature_strides = (channels,), (self.out_stride,)
        self.set_pixels(IMAGENET_MEAN, IMAGENET_STD)

    def forward(self, images, visible=None):
        if visible is None:
            visible = torch.ones(len(images), *self.prepare(images.shape[-2:]), dtype=torch.bool, device=images.device)
        layout = CellLayout(visible, self.cell)
        last = self.encoder(self.normalise(images), visible=layout)
        decoded = self.decoder(last.to_dense(fill=self.mask_token))
        return StudentOutput(decoded, [last], layout, images, pyramid={self.out_stride: decoded})

    def dense_features(self, images):
        return [self.encoder(self.normalise(images))]


# --- encoder
@MODELS.register_module()
class Towers(nn.Module):
    """Three stages and a head; `taps` names the parts whose outputs are the levels, finest first."""

    taps = ("stages.0", "stages.1", "stages.2")

    def __init__(self, width=8):
        super().__init__()
        self.stages = nn.Sequential(
            self.stage(3, width, 4), self.stage(width, 2 * width, 2), self.stage(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, 10)  # behind the last tap: it is not run, and does not train

    def stage(self, before, after, stride):
        convolution = nn.Conv2d(before, after, 5, stride, padding=2, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.SiLU())

    def forward(self, images):
        return self.head(self.stages(images).mean((2, 3)))


# --- mask generator
from hgkd.masking import CountedMask, highest  # noqa: E402


@MODELS.register_module()
class CentreMask(CountedMask):
    """Shows the cells next to a random position."""

    def __call__(self, batch, grid, *, device, generator=None, scores=None):
        centre = torch.rand(batch, 2, 1, 1, generator=generator, device=device)
        rows, columns = (torch.linspace(0, 1, side, device=device) for side in grid)
        near = (rows[None, :, None] - centre[:, 0]).abs() + (columns[None, None, :] - centre[:, 1]).abs()
        return highest(-near, self.count(grid))


# --- export target
from safetensors.torch import load_file, save_file  # noqa: E402

from hgkd.export import Target, Written, register_target  # noqa: E402


def write_halves(job, *, suffix="half"):
    """Weights in fp16; keyword-only arguments are the target's options."""
    file = job.folder / f"weights.{suffix}.safetensors"
    weights = job.network.state_dict()
    save_file({name: value.half() if value.is_floating_point() else value for name, value in weights.items()}, file)
    again = build_encoder(job.source.spec.name).eval()
    again.load_state_dict(load_file(file))  # copies into fp32
    return Written(
        load_with=f"safetensors.torch.load_file('{job.out / file.name}')",
        proven_with="safetensors",
        reloaded=lambda images: job.run(again, job.normalise(images)),
        tensors=len(again.state_dict()),
        parameters=sum(p.numel() for p in again.parameters()),
        tolerance=0.02,
    )


register_target(Target("halves", "weights in fp16", write_halves))
