"""What detectors learn from under mmdetection's conventions, against its rules written out, one box at a time."""

import math

import pytest
import torch
from torch import nn

import odconv

torchvision = pytest.importorskip("torchvision")
from odconv.models.detectors import mmdetection_losses as losses  # noqa: E402

pytestmark = pytest.mark.usefixtures("narrow")
SIZES = {"min_size": 96, "max_size": 160, "num_classes": 4}


def detector(name="mask_rcnn", backbone="od_mobilenetv2_050", **options):
    torch.manual_seed(0)
    return odconv.create_detector(name, backbone, conventions="mmdetection", **SIZES | options)


def targets_of(*boxes, size=(96, 128)):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[y1:y2, x1 : (x1 + x2) // 2] = 1
    return {"boxes": boxes, "labels": torch.arange(len(boxes)) % 3 + 1, "masks": masks}


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def assign(boxes, objects, positive, negative, least):
    """Which object each box matches, -1 for background, -2 for neither."""
    overlaps = [[overlap(box, thing) for thing in objects] for box in boxes]
    found = []
    for row in overlaps:
        best = max(row)
        found.append(row.index(best) if best >= positive else -1 if best < negative else -2)
    for number in range(len(objects) if least is not None else 0):
        best = max(row[number] for row in overlaps)
        for place, row in enumerate(overlaps):
            if best >= least and row[number] == best:
                found[place] = number
    return found


@pytest.mark.parametrize("least", [None, 0.3, 0.5])
def test_boxes_match_objects_by_the_rules(least):
    torch.manual_seed(0)
    corner = torch.randint(0, 60, (200, 2))
    boxes = torch.cat([corner, corner + torch.randint(5, 50, (200, 2))], dim=1).double()
    objects = boxes[[3, 50, 120]] + torch.tensor([3.0, -2.0, 9.0, 5.0])
    objects = torch.cat([objects, torch.tensor([[0.0, 0, 3, 3], [100, 100, 109, 109]])])  # hardly met, and not at all
    matcher = losses.FlooredMatcher(0.7, 0.3, least)
    found = matcher(torchvision.ops.box_iou(objects, boxes))
    assert found.tolist() == assign(boxes.tolist(), objects.tolist(), 0.7, 0.3, least)
    assert {-2, -1} < set(found.tolist())


def test_an_object_takes_its_best_box_from_another_that_overlaps_it_more():
    overlaps = torch.tensor([[0.9, 0.1, 0.2], [0.6, 0.0, 0.1], [0.0, 0.2, 0.1]])
    assert losses.FlooredMatcher(0.7, 0.3, 0.3)(overlaps).tolist() == [1, -1, -1]
    assert losses.FlooredMatcher(0.7, 0.3, None)(overlaps).tolist() == [0, -1, -1]


def test_anchors_in_the_padding_are_neither_objects_nor_background():
    model = detector("faster_rcnn").rpn
    images = torchvision.models.detection.image_list.ImageList(torch.zeros(2, 3, 128, 160), [(128, 160), (70, 33)])
    features = {str(level): torch.zeros(2, 256, 32 >> level, 40 >> level) for level in range(5)}
    anchors = model.anchor_generator(images, list(features.values()))
    wanted = [targets_of((30, 40, 90, 100)), targets_of((100, 100, 140, 120), (5, 6, 30, 50))]
    sized = [t | {"size": s} for t, s in zip(wanted, images.image_sizes, strict=True)]
    labels, matched = model.assign_targets_to_anchors(anchors, sized)
    for places, label, match, target, (height, width) in zip(
        anchors, labels, matched, wanted, [(128, 160), (96, 64)], strict=True
    ):
        x, y = (places[:, 0] + places[:, 2]) / 2, (places[:, 1] + places[:, 3]) / 2
        inside = (x < width) & (y < height)
        assert (label[~inside] == -1).all()
        expected = assign(places[inside].tolist(), target["boxes"].tolist(), 0.7, 0.3, 0.3)
        assert label[inside].tolist() == [1.0 if number >= 0 else 0.0 if number == -1 else -1.0 for number in expected]
        objects = [number for number in expected if number >= 0]
        torch.testing.assert_close(match[inside][label[inside] == 1], target["boxes"][objects])
    nothing, _ = model.assign_targets_to_anchors(anchors[1:], [targets_of() | {"size": (70, 33)}])
    assert set(nothing[0].tolist()) == {0.0, -1.0}


def test_the_losses_of_proposals_are_by_hand():
    model = detector("faster_rcnn").rpn
    labels = [torch.tensor([1.0, 0, -1, 0]), torch.tensor([0.0, -1, 1, 1])]
    model.fg_bg_sampler = lambda labels: ([label == 1 for label in labels], [label == 0 for label in labels])
    logits, deltas, wanted = torch.randn(8, 1), torch.randn(8, 4), torch.randn(2, 4, 4)
    found = model.compute_loss(logits, deltas, labels, list(wanted))
    flat, target = torch.cat(labels), wanted.flatten(0, 1)
    objectness = boxes = 0.0
    for logit, delta, label, aim in zip(logits.flatten(), deltas, flat, target, strict=True):
        if label >= 0:
            chance = torch.sigmoid(logit)
            objectness -= float((chance if label == 1 else 1 - chance).log()) / 6
        if label == 1:
            boxes += float((delta - aim).abs().sum()) / 6
    assert [loss.item() for loss in found] == pytest.approx([objectness, boxes], rel=1e-5)


def test_the_losses_of_heads_are_by_hand():
    torch.manual_seed(0)
    logits, boxes, deltas = torch.randn(6, 4), torch.randn(6, 16), torch.randn(6, 4)
    labels = torch.tensor([0, 3, 1, 0, 2, 2])
    found = losses.box_losses(logits, boxes, labels, deltas)
    distance = sum(
        float((boxes[i, 4 * c : 4 * c + 4] - deltas[i]).abs().sum()) for i, c in enumerate(labels.tolist()) if c > 0
    )
    chances = logits.softmax(1)[torch.arange(6), labels]
    assert found["loss_box_reg"].item() == pytest.approx(distance / 6, rel=1e-5)
    assert found["loss_classifier"].item() == pytest.approx(-chances.log().mean().item(), rel=1e-5)
    masks, wanted = torch.randn(3, 4, 5, 5), torch.randint(0, 2, (3, 5, 5)).float()
    of_class = torch.stack([masks[i, c] for i, c in enumerate((3, 1, 2))]).sigmoid()
    by_hand = -(wanted * of_class.log() + (1 - wanted) * (1 - of_class).log()).mean()
    assert losses.mask_loss(masks, torch.tensor([3, 1, 2]), wanted).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_masks_are_cut_aligned_and_are_0_or_1():
    mask = torch.zeros(2, 40, 60, dtype=torch.uint8)
    mask[1, 10:30, 20:33] = 1
    boxes = torch.tensor([[18.0, 8.0, 46.0, 36.0], [20.0, 10.0, 33.0, 30.0]])
    found = losses.cut_masks(mask, torch.tensor([1, 1]), boxes, 14)
    wanted = torch.zeros(14, 14)
    wanted[1:11, 1:8] = 1  # bins of two pixels; the eighth is covered by half
    torch.testing.assert_close(found[0], wanted)
    assert found[1].eq(1).all()
    assert losses.cut_masks(mask, torch.tensor([0]), boxes[:1], 14).sum() == 0


def test_a_new_detector_begins_as_mmdetection_draws_it(monkeypatch):
    monkeypatch.setattr("odconv.models.detectors.backbone.CHANNELS", 256)
    model = detector(num_classes=81)
    heads, fpn = model.roi_heads, model.backbone.fpn
    for layer, spread in {
        heads.box_predictor.cls_score: 0.01,
        heads.box_predictor.bbox_pred: 0.001,
        heads.box_head.fc6: (2 / (256 * 49 + 1024)) ** 0.5,
        heads.box_head.fc7: (2 / 2048) ** 0.5,
        fpn.inner_blocks[3][0]: (2 / (1280 + 256)) ** 0.5,
        fpn.layer_blocks[0][0]: (2 / (2 * 9 * 256)) ** 0.5,
        model.rpn.head.cls_logits: 0.01,
        model.rpn.head.bbox_pred: 0.01,
    }.items():
        assert layer.weight.std().item() == pytest.approx(spread, rel=0.1)
        assert layer.bias.abs().max() == 0
    assert heads.box_head.fc6.weight.abs().max() <= (6 / (256 * 49 + 1024)) ** 0.5 * 1.001  # uniform


def test_a_detector_learns_what_it_is_shown():
    torch.manual_seed(0)
    fewer = {"box_batch_size_per_image": 32, "rpn_post_nms_top_n_train": 100}
    model = detector("mask_rcnn", frozen_stages=0, norm_eval=False, **fewer)
    images = [torch.rand(3, 96, 128), torch.rand(3, 96, 128)]
    targets = [targets_of((20, 20, 60, 70), (70, 10, 120, 60)), targets_of()]
    optimizer = torch.optim.SGD(model.parameters(), 0.005, 0.9)
    sums = []
    for _ in range(6):
        found = model(images, targets)
        optimizer.zero_grad()
        sum(found.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        sums.append(sum(loss.item() for loss in found.values()))
    assert found.keys() == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    assert sums[-1] < 0.7 * sums[0]


@pytest.mark.parametrize(
    ("name", "backbone"),
    [("faster_rcnn", "dy_mobilenetv2_050"), ("mask_rcnn", "od_mobilenetv2_050"), ("retinanet", "cond_mobilenetv2_050")],
)
def test_what_is_found_on_an_image_does_not_depend_on_its_neighbours(name, backbone):
    torch.manual_seed(0)
    model = odconv.create_detector(name, backbone, score_threshold=0.0, detections_per_image=5, **SIZES)
    for module in model.modules():
        if isinstance(module, odconv.DynamicConv):  # attentions that notice what they pool over
            for head in module.attention.linear_layers():
                nn.init.normal_(head.weight, std=0.5)
    model.eval()
    image = torch.rand(3, 60, 64)
    with torch.no_grad():
        (alone,) = model([image])
        wide, beside = model([torch.rand(3, 40, 200), image])
    assert len(wide["boxes"])
    for key, value in alone.items():
        torch.testing.assert_close(beside[key], value, rtol=0, atol=0)


def test_a_masked_pool_sees_no_padding():
    torch.manual_seed(0)
    few = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20}
    model = odconv.create_detector("mask_rcnn", "dy_tiny", masked_pool=True, **SIZES, **few).double()
    pooled = []
    for module in model.modules():
        if isinstance(module, odconv.layers.Attention) and module.heads:
            module.register_forward_pre_hook(lambda attention, args: pooled.append((attention.extent, args[0])))
    image, wide = torch.rand(3, 96, 64).double(), torch.rand(3, 96, 160).double()
    for training in (True, False):
        pooled.clear()
        model.train(training)
        targets = [
            targets_of((5.0, 5.0, 40.0, 60.0), size=(96, 64)),
            targets_of((9.0, 9.0, 90.0, 60.0), size=(96, 160)),
        ]
        with torch.set_grad_enabled(training):
            model([image, wide], targets if training else None)
        for extent, x in pooled:
            assert (extent * 160).round().tolist() == [[144, 96], [96, 160]]  # resized; padded to 160 x 160
            means = []
            for (height, width), one in zip([(144, 96), (96, 160)], x, strict=True):
                rows, columns = (
                    math.ceil(size * part / 160) for size, part in zip(one.shape[1:], (height, width), strict=True)
                )
                means.append(one[:, :rows, :columns].mean((1, 2)))
            expected = torch.stack(means)
            torch.testing.assert_close(odconv.layers.pooling.pool(x, extent, x.dtype), expected)
    assert all(module.extent is None for module in model.modules() if isinstance(module, odconv.layers.Attention))


def test_a_warehouse_sees_no_padding_either():
    torch.manual_seed(0)
    model = odconv.create_detector("faster_rcnn", "kw_mobilenetv2_050", **SIZES).eval()
    images, batches = [torch.rand(3, 60, 64), torch.rand(3, 40, 200)], []
    model.backbone.register_forward_hook(lambda _, args, y: batches.append(len(args[0])))
    with torch.no_grad():
        model(images)
        model.masked_pool = True
        model(images)
    assert batches == [1, 1, 2]
    attention = next(part for part in model.modules() if isinstance(part, odconv.layers.PoolingAttention))
    x = torch.rand(2, attention.fc1.in_features, 4, 4)
    other = torch.cat([x[:, :, :, :2], torch.rand(2, attention.fc1.in_features, 4, 2)], 3)
    with torch.no_grad(), odconv.layers.pool_inside(model, torch.tensor([[1.0, 0.5]] * 2)):
        torch.testing.assert_close(attention(x), attention(other), rtol=0, atol=0)


def test_extents_that_cannot_be_are_refused():
    layer = odconv.ODConv2d(4, 4, 3)
    for extent in (torch.ones(2, 3), torch.zeros(2, 2), torch.full((2, 2), 1.5), torch.ones(2)):
        with pytest.raises(ValueError, match="extent must"), odconv.layers.pool_inside(layer, extent):
            pass
    with odconv.layers.pool_inside(layer, torch.ones(2, 2)):
        x = torch.randn(2, 4, 6, 6)
        y = layer(x)
    torch.testing.assert_close(layer(x), y)


def test_a_static_backbone_still_takes_its_images_at_once():
    model = odconv.create_detector("faster_rcnn", "mobilenetv2_050", **SIZES).eval()
    batches = []
    model.backbone.register_forward_hook(lambda _, args, y: batches.append(len(args[0])))
    with torch.no_grad():
        assert len(model([torch.rand(3, 60, 64)] * 3)) == 3
    assert batches == [3]
