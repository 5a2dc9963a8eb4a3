"""Norm of the gradient of new networks by temperature: why ODConv is trained from 30 down.

python benchmarks/gradients.py --data ../shared/data/imagenette96
"""

import argparse

import torch
from common import RESULTS, origin, write_rows
from torch.nn import functional as F

import odconv
from odconv.data import normalise, open_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of Imagenette")
    parser.add_argument("--models", nargs="+", default=["od_mobilenetv2_050", "od_resnet18"])
    args = parser.parse_args()
    torch.manual_seed(0)
    images = open_data(args.data, image_size=96, resize_size=96, min_scale=0.35).train
    batch = [images[index] for index in torch.randperm(len(images))[:64].tolist()]
    x, labels = normalise(torch.stack([image for image, _ in batch])), torch.tensor([label for _, label in batch])
    rows = []
    for name in args.models:
        static = name.removeprefix("od_")
        for model_name, n, temperatures in ((static, None, [1]), (name, 1, [30, 5, 1]), (name, 4, [30, 15, 5, 1])):
            for temperature in temperatures:
                torch.manual_seed(0)
                model = odconv.create_model(model_name, kernel_num=n, num_classes=10)
                odconv.set_temperature(model, temperature)
                F.cross_entropy(model(x), labels).backward()
                norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm().item()
                row = {"model": model_name, "kernel_num": n, "temperature": temperature, "gradient_norm": f"{norm:.4g}"}
                print(*row.values())
                rows.append(row | origin())
    write_rows(RESULTS / "gradients.csv", rows)


if __name__ == "__main__":
    main()
