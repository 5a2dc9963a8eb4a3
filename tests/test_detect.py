"""Detectors: what they consist of, train, return, load and refuse; mmdetection's arithmetic against its formulas."""

import copy
import json
import math
import re

import pytest
import tiny
import torch
from parameters import ZOO
from torch import nn

import odconv

pytest.importorskip("torchvision")

from PIL import Image
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, clip_boxes_to_image, roi_align
from torchvision.transforms.functional import to_tensor

from odconv.layers.warehouse_conv import KWConv
from odconv.models.build import shapes_alone
from odconv.models.detectors import conventions, mmdetection_keys

SMALL = {"min_size": 64, "max_size": 96}
PARAMETERS = [  # detector, backbone, kernel_num, parameters, published millions, of them the unused classifier
    ("faster_rcnn", "resnet50", None, 41_757_156, 43.80, 2.049),
    ("faster_rcnn", "od_resnet50", 4, 106_871_012, 108.91, 2.049),
    ("faster_rcnn", "mobilenetv2_100", None, 19_856_548, 21.13, 1.281),
    ("faster_rcnn", "od_mobilenetv2_100", 4, 27_863_825, 29.14, 1.281),
    ("mask_rcnn", "resnet50", None, 44_400_693, 46.45, 2.049),
    ("mask_rcnn", "od_resnet50", 4, 109_514_549, 111.56, 2.049),
    ("mask_rcnn", "mobilenetv2_100", None, 22_500_085, 23.78, 1.281),
    ("mask_rcnn", "od_mobilenetv2_100", 4, 30_507_362, 31.80, 1.281),
]
CHANNELS = {
    "resnet18": [64, 128, 256, 512],
    "resnet34": [64, 128, 256, 512],
    "resnet50": [256, 512, 1024, 2048],
    "resnet101": [256, 512, 1024, 2048],
    "resnet152": [256, 512, 1024, 2048],
    "mobilenetv2_050": [16, 16, 48, 1280],
    "mobilenetv2_075": [24, 24, 72, 1280],
    "mobilenetv2_100": [24, 32, 96, 1280],
    "convnext_tiny": [96, 192, 384, 768],
}


def meta(*args, **options):
    with shapes_alone():
        return odconv.create_detector(*args, **options)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def images_and_targets():
    """Two images of different sizes, the second without objects."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 60, 80, generator=generator), torch.rand(3, 64, 64, generator=generator)]
    boxes = torch.tensor([[5.0, 5, 40, 50], [30, 10, 75, 55]])
    masks = torch.zeros(2, 60, 80, dtype=torch.uint8)
    masks[0, 5:50, 5:40] = masks[1, 10:55, 30:75] = 1
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    return images, [
        {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks},
        {**nothing, "masks": torch.zeros(0, 64, 64, dtype=torch.uint8)},
    ]


# What it consists of


@pytest.mark.parametrize(("name", "backbone", "kernel_num", "parameters", "published", "classifier"), PARAMETERS)
def test_parameters_are_those_of_the_published_rows(name, backbone, kernel_num, parameters, published, classifier):
    detector = meta(name, backbone, kernel_num=kernel_num)
    assert count(detector) == parameters
    assert abs(parameters / 1e6 + classifier - published) < 0.02


def test_retinanet_has_the_parameters_of_torchvisions():
    documented = 34_014_999  # with 91 classes, and with batch norm as buffers
    norms = sum(m.num_features * 2 for m in odconv.create_model("resnet50").modules() if isinstance(m, _BatchNorm))
    assert count(meta("retinanet", "resnet50", num_classes=91)) == documented + norms


@pytest.mark.parametrize("backbone", ZOO)
def test_every_network_of_the_zoo_is_a_backbone(backbone):
    name = ["faster_rcnn", "mask_rcnn", "retinanet"][tiny.LISTED.index(backbone) % 3]
    pyramid = meta(name, backbone).backbone
    static = re.sub("^(odl?|dy|cond|kw)_", "", backbone)
    convolutions = (next(part for part in block if isinstance(part, nn.Conv2d)) for block in pyramid.fpn.inner_blocks)
    channels = [convolution.in_channels for convolution in convolutions]
    assert channels == CHANNELS[static][-len(channels) :]
    dynamic = odconv.DynamicConv | KWConv
    assert any(isinstance(module, dynamic) for module in pyramid.body.modules()) == (static != backbone)


@pytest.mark.parametrize("backbone", ["kw_resnet18", "kw_mobilenetv2_050", "kw_convnext_tiny"])
def test_the_cells_of_a_warehouse_are_parameters_of_the_detector(backbone):
    detector = meta("faster_rcnn", backbone, layer_options={"budget": 1})
    kept = {*detector.parameters()}
    layers = [module for module in detector.modules() if isinstance(module, KWConv)]
    assert len(layers) > 15
    assert all(weight in kept for layer in layers for weight in layer.warehouse.weights)
    assert {"backbone.body.warehouse_manager.weights.0"} <= {*detector.state_dict()}


def test_convnext_has_a_pyramid_whose_levels_are_normalised():
    pyramid = odconv.create_detector("faster_rcnn", "convnext_tiny", frozen_stages=1).backbone.eval()
    assert not any(p.requires_grad for name in ("narrow0", "stage0") for p in pyramid.body[name].parameters())
    assert all(p.requires_grad for name in ("narrow1", "stage3") for p in pyramid.body[name].parameters())
    found = []
    for block in pyramid.fpn.inner_blocks:
        block[1].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.inference_mode():
        levels = pyramid(torch.randn(1, 3, 64, 96))
    assert [tuple(level.shape[1:]) for level in levels.values()][:2] == [(256, 16, 24), (256, 8, 12)]
    assert sorted(x.shape[1] for x in found) == [96, 192, 384, 768]
    for x in found:
        torch.testing.assert_close(x.mean(1), torch.zeros_like(x[:, 0]), rtol=0, atol=1e-5)


def test_levels_of_the_pyramid():
    x = torch.zeros(1, 3, 64, 96)
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    rcnn = odconv.create_detector("faster_rcnn", "mobilenetv2_050").backbone(x)
    assert [tuple(level.shape) for level in rcnn.values()] == [(1, 256, *size) for size in sizes]
    retinanet = odconv.create_detector("retinanet", "mobilenetv2_050").backbone(x)
    assert [tuple(level.shape) for level in retinanet.values()] == [(1, 256, *size) for size in [*sizes[1:], (1, 1)]]


# Training and evaluation


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("name", "backbone", "kernel_num"),
    [
        ("mask_rcnn", "od_resnet18", 1),
        pytest.param(*("faster_rcnn", "od_mobilenetv2_050", 1), marks=pytest.mark.slow),
        pytest.param(*("faster_rcnn", "dy_mobilenetv2_050", 2), marks=pytest.mark.slow),
        ("retinanet", "cond_mobilenetv2_050", 2),
        ("mask_rcnn", "mobilenetv2_050", None),
    ],
)
def test_a_training_step_reaches_all_but_what_is_frozen(name, backbone, kernel_num):
    torch.manual_seed(0)
    detector = odconv.create_detector(name, backbone, kernel_num=kernel_num, num_classes=4, **SMALL).eval().train()
    norms = {n: m for n, m in detector.backbone.body.named_modules() if isinstance(m, _BatchNorm)}
    assert norms
    assert not any(norm.training for norm in norms.values())
    assert backbone.startswith("od_") == any("attention" in norm for norm in norms)
    before = {key: tensor.clone() for key, tensor in detector.named_buffers()}
    losses = detector(*images_and_targets())
    assert {"mask_rcnn": 5, "faster_rcnn": 4, "retinanet": 2}[name] == len(losses)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    frozen = ("conv1.", "bn1.", "layer1.") if "resnet" in backbone else ("0.", "1.", "2.", "3.")
    for key, parameter in detector.named_parameters():
        if key.removeprefix("backbone.body.").startswith(frozen) and key.startswith("backbone.body."):
            assert not parameter.requires_grad, key
            assert parameter.grad is None, key
        else:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
    assert all(torch.equal(tensor, before[key]) for key, tensor in detector.named_buffers())


@pytest.mark.usefixtures("narrow")
def test_freezing_and_batch_norm_are_options():
    def trained(**options):
        detector = odconv.create_detector("faster_rcnn", "od_mobilenetv2_050", **options)
        body = detector.backbone.body
        weights = [int(key.split(".")[0]) for key, weight in body.named_parameters() if weight.requires_grad]
        statistics = [
            int(key.split(".")[0]) for key, m in body.named_modules() if isinstance(m, _BatchNorm) and m.training
        ]
        return sorted({*weights}), sorted({*statistics})

    assert trained() == ([*range(4, 19)], [])
    assert trained(frozen_stages=0) == ([*range(19)], [])
    assert trained(frozen_stages=0, norm_eval=False) == ([*range(19)], [*range(19)])
    assert trained(frozen_stages=2, norm_eval=False) == ([*range(7, 19)], [*range(7, 19)])
    assert trained(frozen_stages=4) == ([], [])


@pytest.mark.usefixtures("narrow")
def test_copies_and_synchronised_batch_norm_stay_frozen_too():
    options = {"frozen_stages": 2, "norm_eval": False}
    detector = copy.deepcopy(odconv.create_detector("faster_rcnn", "od_resnet18", **options))
    body = nn.SyncBatchNorm.convert_sync_batchnorm(detector).eval().train().backbone.body
    modes = {key: m.training for key, m in body.named_modules() if isinstance(m, nn.SyncBatchNorm)}
    assert modes["bn1"] is modes["layer2.0.conv1.attention.bn"] is False
    assert modes["layer3.0.bn1"] is modes["layer3.0.conv1.attention.bn"] is True


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("name", "conventions"),
    [("faster_rcnn", "torchvision"), ("mask_rcnn", "mmdetection"), ("retinanet", "torchvision")],
)
def test_mixed_precision_does_not_round_boxes(name, conventions):
    torch.manual_seed(0)
    options = {"num_classes": 4, "score_threshold": 0.0, "conventions": conventions, **SMALL}
    detector = odconv.create_detector(name, "od_mobilenetv2_050", **options)
    images, targets = images_and_targets()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert all(loss.isfinite() for loss in detector(images, targets).values())
        found = detector.eval()(images)[0]["boxes"]
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float())
    boxes = torch.tensor([[900.3, 700.6, 1200.1, 755.9]])
    coder = detector.head.regression_head.box_coder if name == "retinanet" else detector.roi_heads.box_coder
    torch.testing.assert_close(coder.decode_single(torch.zeros(1, 4, dtype=torch.bfloat16), boxes), boxes)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("conventions", ["torchvision", "mmdetection"])
def test_mask_rcnn_returns_boxes_labels_scores_and_masks(conventions):
    torch.manual_seed(0)
    detector = odconv.create_detector(
        "mask_rcnn", "od_mobilenetv2_050", num_classes=4, detections_per_image=7, conventions=conventions, **SMALL
    ).eval()
    images, targets = images_and_targets()
    with torch.no_grad():
        for image, found in zip(images, detector(images), strict=True):
            height, width = image.shape[1:]
            assert {key: tuple(value.shape) for key, value in found.items()} == {
                "boxes": (7, 4),
                "labels": (7,),
                "scores": (7,),
                "masks": (7, 1, height, width),
            }
            limits = torch.tensor([width, height, width, height])
            assert ((found["boxes"] >= 0) & (found["boxes"] <= limits)).all()
            assert ((found["labels"] >= 1) & (found["labels"] <= 3)).all()
            assert (found["scores"].diff() <= 0).all()
            assert ((found["masks"] >= 0) & (found["masks"] <= 1)).all()
            assert found["masks"].max() > 0.1
    detector.train()
    assert all(loss.isfinite() for loss in detector(images, targets).values())


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("conventions", ["torchvision", "mmdetection"])
def test_images_without_objects_train_and_pictures_without_detections_return_nothing(conventions):
    torch.manual_seed(0)
    detector = odconv.create_detector(
        "mask_rcnn", "mobilenetv2_050", num_classes=4, score_threshold=0.999, conventions=conventions, **SMALL
    )
    nothing = images_and_targets()[1][1]
    losses = detector([torch.rand(3, 64, 64)] * 2, [nothing] * 2)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_mask"] == losses["loss_box_reg"] == 0
    with torch.no_grad():
        (found,) = detector.eval()([torch.rand(3, 60, 80)])
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "scores": (0,),
        "masks": (0, 1, 60, 80),
    }


def test_retinanet_returns_as_many_detections_as_asked():
    torch.manual_seed(0)
    options = {"score_threshold": 0.0, "detections_per_image": 5, "nms_threshold": 0.3, **SMALL}
    detector = odconv.create_detector("retinanet", "mobilenetv2_050", num_classes=4, **options).eval()
    with torch.no_grad():
        found = detector(images_and_targets()[0])
    assert [{key: len(value) for key, value in one.items()} for one in found] == [
        {"boxes": 5, "scores": 5, "labels": 5}
    ] * 2
    assert all(((one["labels"] >= 0) & (one["labels"] <= 3)).all() for one in found)


@pytest.mark.usefixtures("narrow")
def test_sizes_and_temperature_are_options():
    detector = meta(
        "retinanet", "od_resnet18", min_size=(300, 400), max_size=500, anchor_sizes=(8, 16, 32, 64, 100), temperature=3
    )
    assert (detector.transform.min_size, detector.transform.max_size) == ([300, 400], 500)
    assert detector.anchor_generator.sizes[0] == (8, 10, 12)
    assert detector.anchor_generator.sizes[4] == (100, 125, 158)
    defaults = odconv.create_detector("faster_rcnn", "od_mobilenetv2_050", rpn_post_nms_top_n_test=50)
    assert defaults.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert defaults.rpn.post_nms_top_n() == 2000
    assert defaults.eval().rpn.post_nms_top_n() == 50
    assert temperatures(defaults) == {1.0}
    assert temperatures(odconv.create_detector("faster_rcnn", "od_mobilenetv2_050", temperature=3)) == {3.0}


def temperatures(detector):
    return {
        m.temperature.item() for m in detector.modules() if isinstance(getattr(m, "temperature", None), torch.Tensor)
    }


# Weights


def test_torchvisions_own_detector_computes_the_same(tmp_path):
    torch.manual_seed(0)
    pyramid = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d)
    theirs = detection.MaskRCNN(pyramid, 4, box_detections_per_img=10, **SMALL).eval()
    torch.save(theirs.state_dict(), tmp_path / "mask_rcnn.pth")
    ours = odconv.create_detector(
        "mask_rcnn", "resnet18", num_classes=4, weights=tmp_path / "mask_rcnn.pth", detections_per_image=10, **SMALL
    ).eval()
    images, _ = images_and_targets()
    with torch.no_grad():
        for found, expected in zip(ours(images), theirs(images), strict=True):
            assert len(found["boxes"])
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def wrapped(state, form):
    """The state dict as a file may hold it."""
    return {
        "plain": state,
        "published": {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}},
        "lightning": {
            "state_dict": {f"model.{key}": value for key, value in state.items()},
            "odconv": {"temperature": 7.0},
        },
        "headless": {key: value for key, value in state.items() if not key.startswith("classifier")},
    }[form]


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("form", ["plain", "published", "lightning", "headless"])
def test_a_classifiers_checkpoint_is_the_backbone(form, tmp_path):
    network = odconv.create_model("od_mobilenetv2_050", kernel_num=2, num_classes=17)
    torch.save(wrapped(network.state_dict(), form), tmp_path / "network.pth")
    detector = odconv.create_detector(
        "faster_rcnn", "od_mobilenetv2_050", kernel_num=2, weights_backbone=tmp_path / "network.pth"
    )
    body = detector.backbone.body.state_dict()
    expected = network.features.state_dict()
    assert body.keys() == expected.keys()
    assert all(torch.equal(body[key], expected[key]) for key in expected)
    assert temperatures(detector) == {1.0}
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(detector.eval().backbone.body(x)["3"], network.eval().features(x))


@pytest.mark.usefixtures("narrow")
def test_a_detectors_own_checkpoint(tmp_path):
    make = {"name": "retinanet", "backbone": "od_mobilenetv2_050", "num_classes": 3}
    detector = odconv.create_detector(**make)
    odconv.checkpoints.save_safetensors(detector, tmp_path / "detector.safetensors")
    again = odconv.create_detector(**make, weights=tmp_path / "detector.safetensors").state_dict()
    assert all(torch.equal(again[key], value) for key, value in detector.state_dict().items())


@pytest.mark.usefixtures("narrow")
def test_a_real_picture_with_a_warm_start_from_real_weights(shared_data):
    torch.manual_seed(0)
    network = odconv.create_model(
        "mobilenetv2_100", weights=shared_data / "weights" / "mobilenet_v2_1.0_imagenet_fp16.pth"
    )
    odconv.convert(network)
    detector = odconv.create_detector("faster_rcnn", network, min_size=160, max_size=224)
    content = json.loads((shared_data / "coco-mini" / "annotations" / "instances_train2017.json").read_text())
    objects = [entry for entry in content["annotations"] if entry["image_id"] == 24577 and not entry["iscrowd"]]
    boxes = torch.tensor([entry["bbox"] for entry in objects])
    boxes[:, 2:] += boxes[:, :2]
    targets = [{"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.long)}]
    images = [to_tensor(Image.open(shared_data / "coco-mini" / "train2017" / "000000024577.jpg").convert("RGB"))]
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.002, momentum=0.9)
    course = []
    for _ in range(3):
        loss = sum(detector(images, targets).values())
        course.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert course[-1] < 0.5 * course[0]


# mmdetection


def mmdetection_state(masks=True, classes=80):
    """A checkpoint of OD-MobileNetV2 0.5 with mmdetection's names and shapes, and random values."""
    torch.manual_seed(1)
    backbone = odconv.create_model("od_mobilenetv2_050")
    shapes = {
        **{f"neck.lateral_convs.{level}.conv": (256, c, 1, 1) for level, c in enumerate((16, 16, 48, 1280))},
        **{f"neck.fpn_convs.{level}.conv": (256, 256, 3, 3) for level in range(4)},
        "rpn_head.rpn_conv": (256, 256, 3, 3),
        "rpn_head.rpn_cls": (3, 256, 1, 1),
        "rpn_head.rpn_reg": (12, 256, 1, 1),
        "roi_head.bbox_head.fc_cls": (classes + 1, 1024),
        "roi_head.bbox_head.fc_reg": (4 * classes, 1024),
        "roi_head.bbox_head.shared_fcs.0": (1024, 256 * 49),
        "roi_head.bbox_head.shared_fcs.1": (1024, 1024),
    }
    if masks:
        shapes |= {f"roi_head.mask_head.convs.{layer}.conv": (256, 256, 3, 3) for layer in range(4)}
        shapes |= {
            "roi_head.mask_head.upsample": (256, 256, 2, 2),
            "roi_head.mask_head.conv_logits": (classes, 256, 1, 1),
        }
    state = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    for name, shape in shapes.items():
        scale = math.prod(shape[1:]) ** -0.5 * (20 if name.endswith("fc_cls") else 1)  # some classes are likely
        state[f"{name}.weight"] = torch.randn(shape) * scale
        state[f"{name}.bias"] = torch.randn(shape[1] if name.endswith("upsample") else shape[0]) * scale
    return state


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """mmdetection's Mask R-CNN as a state dict, and the detector that it was loaded into."""
    state = mmdetection_state()
    path = tmp_path_factory.mktemp("mmdetection") / "mask_rcnn.pth"
    torch.save({"meta": {"epoch": 12, "CLASSES": ("person",)}, "state_dict": state}, path)
    return state, odconv.create_detector(
        "mask_rcnn", "od_mobilenetv2_050", weights=path, min_size=72, max_size=128, detections_per_image=25
    ).eval()


def test_every_tensor_of_a_published_detector_has_its_place(published):
    state, detector = published
    ours = detector.state_dict()
    translated = mmdetection_keys.translate(state)
    assert translated.keys() == ours.keys()
    assert all(torch.equal(ours[key], value) for key, value in translated.items())
    used = sum(value.numel() for key, value in state.items() if "classifier" not in key)
    background = 4 * (1024 + 1) + (256 + 1)  # a box and a mask, which there are not
    assert sum(value.numel() for value in ours.values()) == used + background


def test_the_box_head_of_a_published_detector(published):
    state, detector = published
    x = torch.randn(6, 256, 7, 7)
    boxes = torch.rand(6, 4) * 50
    boxes[:, 2:] += boxes[:, :2] + 10

    def linear(name, value):
        return value @ state[f"roi_head.bbox_head.{name}.weight"].T + state[f"roi_head.bbox_head.{name}.bias"]

    hidden = linear("shared_fcs.1", linear("shared_fcs.0", x.flatten(1)).relu()).relu()
    scores, deltas = linear("fc_cls", hidden).softmax(1), 40 * linear("fc_reg", hidden)  # some beyond the limits
    with torch.no_grad():
        heads = detector.roi_heads
        found_logits, found_deltas = heads.box_predictor(heads.box_head(x))
        found_boxes = heads.box_coder.decode(40 * found_deltas, [boxes])
    torch.testing.assert_close(found_logits.softmax(1)[:, 1:], scores[:, :80])
    torch.testing.assert_close(found_logits.softmax(1)[:, 0], scores[:, 80])
    expected = decode(boxes[:, None], deltas.reshape(6, 80, 4) * torch.tensor([0.1, 0.1, 0.2, 0.2]))
    assert (deltas.abs().reshape(-1, 4)[:, 2:] * 0.2 > math.log(1000 / 16)).any()
    torch.testing.assert_close(found_boxes[:, 1:], expected, rtol=1e-4, atol=1e-3)


def decode(boxes, deltas):
    """Boxes whose centre moves by deltas of their size, and whose size grows or shrinks by at most 1000/16."""
    size = boxes[..., 2:] - boxes[..., :2]
    centre = (boxes[..., 2:] + boxes[..., :2]) / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].exp().clamp(16 / 1000, 1000 / 16) / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def test_the_proposals_of_a_published_detector(published):
    state, detector = published
    features = torch.randn(1, 256, 4, 6)
    hidden = F.conv2d(features, state["rpn_head.rpn_conv.weight"], state["rpn_head.rpn_conv.bias"], padding=1).relu()
    with torch.no_grad():
        logits, deltas = detector.rpn.head([features])
        torch.testing.assert_close(
            logits[0], F.conv2d(hidden, state["rpn_head.rpn_cls.weight"], state["rpn_head.rpn_cls.bias"])
        )
        torch.testing.assert_close(
            deltas[0], F.conv2d(hidden, state["rpn_head.rpn_reg.weight"], state["rpn_head.rpn_reg.bias"])
        )
    codes = torch.tensor([[0.1, -0.2, 0.3, -0.4], [0.0, 0.0, 9.0, -9.0]])
    boxes = torch.tensor([[10.0, 20, 50, 40], [10, 20, 50, 40]])
    torch.testing.assert_close(detector.rpn.box_coder.decode(codes, [boxes])[:, 0], decode(boxes, codes))


def test_anchors_are_not_rounded_and_a_fixed_stride_apart(published):
    _, detector = published
    grids = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]  # 800 x 1344: at the last, 800 / 13 is not 64
    images = ImageList(torch.zeros(1, 3, 800, 1344), [(800, 1333)])
    (found,) = detector.rpn.anchor_generator(images, [torch.zeros(1, 256, *grid) for grid in grids])
    torch.testing.assert_close(found, torch.cat([anchors(grid, 4 << level) for level, grid in enumerate(grids)]))


def anchors(grid, stride):
    """Boxes of 8 strides around every position, by position and then by ratio of height to width."""
    y, x = torch.meshgrid(*(torch.arange(size) * stride for size in grid), indexing="ij")
    shapes = [(4 * stride * ratio**0.5, 4 * stride / ratio**0.5) for ratio in (0.5, 1.0, 2.0)]
    return torch.stack([torch.stack([x - w, y - h, x + w, y + h], dim=-1) for h, w in shapes], dim=2).reshape(-1, 4)


def test_pooling_is_aligned_adaptive_and_from_the_level_of_the_size():
    torch.manual_seed(0)
    maps = {str(level): torch.randn(2, 3, 128 >> level, 160 >> level) for level in range(4)}
    boxes = [
        torch.tensor([[40.3, 50.2, 151.9, 161.0], [40.3, 50.2, 152.4, 162.3]]),  # sides below and above 112
        torch.tensor([[60.0, 70.0, 300.0, 290.0], [20.0, 30.0, 520.0, 485.0], [99.0, 99.0, 103.0, 130.0]]),
    ]
    found = conventions.Pool(7)(maps, boxes, [(512, 640)] * 2)
    levels = [0, 1, 2, 3, 0]
    flat = [(image, box) for image, several in enumerate(boxes) for box in several.tolist()]
    for output, level, (image, box) in zip(found, levels, flat, strict=True):
        torch.testing.assert_close(output, pooled(maps[str(level)][image], box, 4 << level), rtol=1e-4, atol=1e-4)


def pooled(features, box, stride, bins=7):
    """Means of bilinear samples, as many a bin as it has pixels; pixel (0, 0) has its centre at (0.5, 0.5)."""
    x1, y1, x2, y2 = (side / stride - 0.5 for side in box)
    height, width = (y2 - y1) / bins, (x2 - x1) / bins
    rows, columns = math.ceil(height), math.ceil(width)
    y = y1 + height / rows * (torch.arange(bins * rows) + 0.5)
    x = x1 + width / columns * (torch.arange(bins * columns) + 0.5)
    values = interpolation(y, features.shape[1]) @ features @ interpolation(x, features.shape[2]).T
    return values.reshape(-1, bins, rows, bins, columns).mean((2, 4))


def interpolation(points, size):
    """The matrix of linear interpolation at points within 0 .. size - 1."""
    assert (points >= 0).all()
    assert (points <= size - 1).all()
    return (1 - (points[:, None] - torch.arange(size)).abs()).clamp(min=0)


@pytest.mark.parametrize(
    ("old", "new"),
    [((427, 640), (800, 1199)), ((480, 640), (800, 1067)), ((640, 359), (1333, 748)), ((30, 50), (800, 1333))],
)
def test_images_are_resized_to_the_nearest_pixel(old, new):
    transform = conventions.Transform([800], 1333, [0.0] * 3, [1.0] * 3).eval()
    target = {"boxes": torch.tensor([[0.0, 0, old[1], old[0]]])}
    image, target = transform.resize(torch.rand(3, *old), target)
    assert tuple(image.shape[-2:]) == new
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.0, 0, new[1], new[0]]]))


def test_masks_are_pasted_by_sampling_at_the_centres_of_pixels():
    ramp = torch.arange(28.0).expand(1, 1, 28, 28)
    box = torch.tensor([[3.3, 4.0, 45.3, 32.0]])
    image = conventions.paste(ramp, box, 40, 50)[0, 0]
    x = (torch.arange(50) + 0.5 - 3.3) / 42 * 28 - 0.5  # in cells of the mask, whose first has its centre at 0
    inner = (x >= 0) & (x <= 27)
    torch.testing.assert_close(image[10, inner], x[inner], rtol=1e-4, atol=1e-3)
    assert image[:3].eq(0).all()
    assert image[33:].eq(0).all()
    assert image[:, :2].eq(0).all()


def test_a_published_detector_from_picture_to_masks(published):
    """The whole of mmdetection's inference, written straight down."""
    state, detector = published
    detector = copy.deepcopy(detector).double()
    state = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}

    def conv(name, x, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def linear(name, x):
        return F.linear(x, state[f"roi_head.bbox_head.{name}.weight"], state[f"roi_head.bbox_head.{name}.bias"])

    def pool(boxes, size):
        level = ((boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt() / 56).log2().floor().clamp(0, 3).long()
        return torch.cat(
            [roi_align(maps[k], [box[None]], size, 0.25 / 2**k, 0, True) for k, box in zip(level, boxes, strict=True)]
        )

    def propose(k, features):
        hidden = conv("rpn_head.rpn_conv", features, padding=1).relu()
        score = conv("rpn_head.rpn_cls", hidden)[0].permute(1, 2, 0).flatten().sigmoid()
        delta = conv("rpn_head.rpn_reg", hidden)[0].permute(1, 2, 0).reshape(-1, 4)
        best = score.argsort(descending=True)[:1000]
        boxes = decode(anchors(features.shape[2:], 4 << k)[best], delta[best])
        return clip_boxes_to_image(boxes, (height, width)), score[best], torch.full_like(best, k)

    image = torch.rand(3, 75, 110, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    height, width = 72, 106  # 110 * 72 / 75 = 105.6
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()[..., None, None]
    resized = F.interpolate((image - mean)[None] / std, size=(height, width), mode="bilinear", align_corners=False)
    with torch.no_grad():
        (found,) = detector([image])
        x = F.pad(resized, (0, 128 - width, 0, 96 - height))
        laterals = [conv(f"neck.lateral_convs.{k}.conv", m) for k, m in enumerate(detector.backbone.body(x).values())]
        for k in (3, 2, 1):
            laterals[k - 1] = laterals[k - 1] + F.interpolate(laterals[k], size=laterals[k - 1].shape[2:])
        maps = [conv(f"neck.fpn_convs.{k}.conv", lateral, padding=1) for k, lateral in enumerate(laterals)]
        maps.append(F.max_pool2d(maps[3], 1, stride=2))

        proposals, scores, levels = (torch.cat(parts) for parts in zip(*map(propose, range(5), maps), strict=True))
        proposals = proposals[batched_nms(proposals, scores, levels, 0.7)[:1000]]

        hidden = linear("shared_fcs.1", linear("shared_fcs.0", pool(proposals, 7).flatten(1)).relu()).relu()
        scores = linear("fc_cls", hidden).softmax(1)[:, :80]
        deltas = linear("fc_reg", hidden).reshape(-1, 80, 4) * torch.tensor([0.1, 0.1, 0.2, 0.2]).double()
        boxes = clip_boxes_to_image(decode(proposals[:, None], deltas), (height, width))
        which, classes = torch.where(scores > 0.05)
        kept = batched_nms(boxes[which, classes], scores[which, classes], classes, 0.5)[:25]
        which, classes = which[kept], classes[kept]
        boxes, scores = boxes[which, classes], scores[which, classes]

        hidden = pool(boxes, 14)
        for layer in range(4):
            hidden = conv(f"roi_head.mask_head.convs.{layer}.conv", hidden, padding=1).relu()
        weight, bias = (state[f"roi_head.mask_head.upsample.{name}"] for name in ("weight", "bias"))
        hidden = F.conv_transpose2d(hidden, weight, bias, stride=2).relu()
        masks = conv("roi_head.mask_head.conv_logits", hidden).sigmoid()[torch.arange(len(classes)), classes, None]
        boxes = boxes * torch.tensor([110 / width, 75 / height] * 2).double()
        points = torch.stack(torch.meshgrid(torch.arange(110) + 0.5, torch.arange(75) + 0.5, indexing="xy"), dim=-1)
        grids = (points - boxes[:, None, None, :2]) / (boxes[:, 2:] - boxes[:, :2])[:, None, None] * 2 - 1
        masks = F.grid_sample(masks, grids, align_corners=False)

    assert len(scores) == 25
    assert torch.equal(found["labels"], classes + 1)
    torch.testing.assert_close(found["scores"], scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["boxes"], boxes, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found["masks"], masks, rtol=1e-4, atol=1e-4)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fasterrcnn"}, "unknown detector 'fasterrcnn'; did you mean faster_rcnn"),
        ({"name": "yolo"}, "known are faster_rcnn, mask_rcnn, retinanet"),
        ({"backbone": "od_resnet81"}, "unknown model 'od_resnet81'; did you mean"),
        ({"backbone": nn.Conv2d(3, 3, 3)}, "MobileNetV2 of torchvision or a ConvNeXt, got a Conv2d"),
        (
            {"backbone": odconv.create_model("resnet18"), "kernel_num": 4},
            "kernel_num, reduction and layer_options must be None",
        ),
        ({"kernel_num": 4}, "mobilenetv2_050 is static"),
        ({"num_classes": 1}, "num_classes must be an int of at least 2, the background and one class, got 1"),
        ({"num_classes": 2.0}, "num_classes must be an int"),
        ({"frozen_stages": 5}, "frozen_stages must be 0, 1, 2, 3 or 4, got 5"),
        ({"min_size": 900, "max_size": 800}, "1 <= min_size <= max_size, got 900 and 800"),
        ({"min_size": ()}, "1 <= min_size <= max_size"),
        ({"anchor_sizes": (32, 64)}, "anchor_sizes must be five positive numbers"),
        ({"temperature": 0}, "temperature must be a positive number"),
        ({"conventions": "detectron"}, "conventions must be one of"),
        ({"name": "retinanet", "conventions": "mmdetection"}, "not retinanet"),
    ],
)
def test_what_cannot_be_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        odconv.create_detector(**{"name": "faster_rcnn", "backbone": "mobilenetv2_050"} | arguments)


def test_a_network_without_a_classifier_loads_no_classification_weights(tmp_path):
    torch.save(nn.Conv2d(3, 3, 3).state_dict(), tmp_path / "conv.pth")
    with pytest.raises(ValueError, match="must have one linear layer, its classifier, got 0"):
        odconv.create_detector("faster_rcnn", nn.Conv2d(3, 3, 3), weights_backbone=tmp_path / "conv.pth")


def test_unknown_options_name_the_nearest():
    with pytest.raises(TypeError, match="no option 'box_nms_tresh', nor has FasterRCNN; did you mean box_nms_thresh"):
        odconv.create_detector("faster_rcnn", "mobilenetv2_050", box_nms_tresh=0.3)
    with pytest.raises(TypeError, match=r"layers of the backbone have it: layer_options=\{'norm': \.\.\.\}"):
        odconv.create_detector("faster_rcnn", "cond_mobilenetv2_050", norm="layer")


@pytest.mark.usefixtures("narrow")
def test_weights_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        odconv.create_detector("faster_rcnn", "mobilenetv2_050", weights_backbone=tmp_path / "nothing.pth")
    path = tmp_path / "network.pth"
    torch.save(odconv.create_model("od_mobilenetv2_050", kernel_num=2).state_dict(), path)
    with pytest.raises(ValueError, match="kernel_num is 2 in the file, 4 in the model"):
        odconv.create_detector("faster_rcnn", "od_mobilenetv2_050", kernel_num=4, weights_backbone=path)
    with pytest.raises(ValueError, match="the file is of a dynamic network, the model is static"):
        odconv.create_detector("faster_rcnn", "mobilenetv2_050", weights_backbone=path)
    with pytest.raises(ValueError, match="does not fit the FasterRCNN"):
        odconv.create_detector("faster_rcnn", "od_mobilenetv2_050", weights=path)


def test_published_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "faster_rcnn.pth"
    torch.save({"state_dict": mmdetection_state(masks=False, classes=20)}, path)
    faster = odconv.create_detector("faster_rcnn", "od_mobilenetv2_050", num_classes=21, weights=path)
    assert isinstance(faster.transform, conventions.Transform)
    fine_tuned = odconv.create_detector(
        "faster_rcnn", "od_mobilenetv2_050", num_classes=21, weights=path, conventions="torchvision"
    )
    assert not isinstance(fine_tuned.transform, conventions.Transform)
    with pytest.raises(ValueError, match="num_classes is 21 in the file, 81 in the model"):
        odconv.create_detector("faster_rcnn", "od_mobilenetv2_050", weights=path)
    with pytest.raises(ValueError, match=r"missing in the file: .*mask_head\.0\.0\.weight"):
        odconv.create_detector("mask_rcnn", "od_mobilenetv2_050", num_classes=21, weights=path)
    with pytest.raises(ValueError, match="not retinanet"):
        odconv.create_detector("retinanet", "od_mobilenetv2_050", weights=path)


@pytest.mark.usefixtures("narrow")
def test_a_new_predictor_on_a_warm_start(tmp_path):
    network = odconv.convert(odconv.create_model("mobilenetv2_050"), kernel_num=2)
    warm = odconv.create_detector("faster_rcnn", network, num_classes=4, temperature=10.0).eval()
    torch.save(warm.state_dict(), tmp_path / "warm.pth")
    options = {"kernel_num": 2, "weights": tmp_path / "warm.pth", "new_predictor": True}
    other = odconv.create_detector("faster_rcnn", "od_mobilenetv2_050", num_classes=7, **options).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():  # gain 2 and temperature 10 are the file's
        maps = zip(warm.backbone(x).values(), other.backbone(x).values(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in maps)
    assert other.roi_heads.box_predictor.cls_score.out_features == 7
    with pytest.raises(ValueError, match="keys missing in the file: roi_heads"):
        odconv.create_detector("mask_rcnn", "od_mobilenetv2_050", num_classes=7, **options)


def test_the_classes_that_mmdetection_notes_are_those_of_the_detector(tmp_path):
    from odconv.app.detect.restore import restore

    names = ("cat", "unicorn", "dog")
    state = mmdetection_state(masks=False, classes=3)
    for noted, found in ((names, list(names)), (("person",), ["class 1", "class 2", "class 3"])):
        torch.save({"meta": {"CLASSES": noted}, "state_dict": state}, tmp_path / "faster.pth")
        restored = restore(str(tmp_path / "faster.pth"), detector="faster_rcnn", arch="od_mobilenetv2_050")
        assert (restored.classes, restored.categories) == (found, [1, 2, 3])


def test_a_resnet_of_caffes_style_is_refused_by_name(tmp_path):
    config = "model = dict(\n    backbone=dict(type='ResNet', depth=50, style='caffe'))\n"
    torch.save({"meta": {"config": config}, "state_dict": mmdetection_state(masks=False)}, tmp_path / "caffe.pth")
    with pytest.raises(ValueError, match=r"caffe\.pth holds a detector on a ResNet of style 'caffe'"):
        odconv.create_detector("faster_rcnn", "od_mobilenetv2_050", weights=tmp_path / "caffe.pth")
