"""From a network to a file of ONNX, and answers from onnxruntime, which needs neither odconv nor PyTorch.

python examples/deploy.py --weights runs/od_resnet18/best.ckpt --out od_resnet18.onnx
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime

import odconv


def export(out: Path, weights: str | None = None, arch: str = "od_resnet18", size: int = 224) -> None:
    """Write the file; it is compared with the network before it takes its place."""
    model = odconv.create_model(arch, kernel_num=4, weights=weights).eval()
    odconv.fuse(model)  # batch norm goes into the convolutions before it
    written = odconv.export_onnx(model, out, (3, size, size), metadata={"mean": [0.485, 0.456, 0.406], "size": size})
    print(f"{out}: {written.megabytes:.1f} MB, differs by {written.error:.1e} from PyTorch")


class Network:
    """What a program does that has the file alone.

    Args:
        file: what `export` wrote.
    """

    def __init__(self, file: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(file))
        notes = self.session.get_modelmeta().custom_metadata_map
        self.size = json.loads(notes["size"])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the logits, (B, classes), of normalised images, (B, 3, size, size), for any B."""
        (logits,) = self.session.run(None, {"images": images.astype(np.float32)})
        return logits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="file of weights; without it they are random")
    parser.add_argument("--arch", default="od_resnet18", help="network of the zoo")
    parser.add_argument("--out", type=Path, default=Path("od_resnet18.onnx"))
    options = parser.parse_args()
    export(options.out, options.weights, options.arch)
    network = Network(options.out)
    for batch in (1, 3):
        noise = np.random.default_rng(0).standard_normal((batch, 3, network.size, network.size))
        print(f"{batch} images: classes {network(noise).argmax(1).tolist()}")
