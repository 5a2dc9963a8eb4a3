"""A server for a trained classifier: an image in, its most probable classes out, computed in batches.

    python examples/serving/server.py --weights od_resnet18.onnx
    curl --data-binary @photo.jpg http://127.0.0.1:8000/inference

Images are read one at a time, in processes of their own: one that cannot be read is the trouble of its sender alone.
What the server counts, such as the sizes of batches, is at /metrics.
"""

import argparse
import sys
from collections.abc import Callable
from multiprocessing import get_context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="exported file, checkpoint, or folder or name on the Hub")
    parser.add_argument("--trust", action="store_true", help="open a .pt2 file, which can run code as it is opened")
    parser.add_argument("--address", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=8, help="most images computed together")
    parser.add_argument("--wait", type=int, default=5, help="milliseconds that an image waits for others at most")
    parser.add_argument("--readers", type=int, default=1, help="processes that read images")
    parser.add_argument("--timeout", type=int, default=10, help="seconds after which a request is given up")
    parser.add_argument("--megabytes", type=int, default=10, help="largest file taken")
    parser.add_argument("--megapixels", type=int, default=50, help="largest image taken, in millions of pixels")
    args = parser.parse_args()

    for name in ("batch", "readers", "timeout", "megabytes", "megapixels"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    # mosec reads the command line as it is imported
    sys.argv[1:] = ["--address", args.address, "--port", str(args.port), "--timeout", str(1000 * args.timeout)]
    sys.argv += ["--max-request-size", str(10**6 * args.megabytes)]
    try:
        from mosec import Server
        from stages import Classify, Loaded, Read
    except ModuleNotFoundError as error:
        sys.exit(f"server.py: error: {error}: pip install '.[train,export]' mosec")

    try:
        server = Server()
    except RuntimeError as error:  # the port is taken
        sys.exit(f"server.py: error: {error}")
    Loaded.weights, Loaded.trust, Loaded.pixels = args.weights, args.trust, 10**6 * args.megapixels
    # in a process of its own: nothing may be computed here, and mosec would start workers that fail again and again
    trial = get_context("fork").Process(target=try_to_load, args=(Read,))
    trial.start()
    trial.join()
    if trial.exitcode:
        sys.exit(trial.exitcode)
    # forked, since nothing has been computed here: with what is imported, and the name of the weights
    server.append_worker(Read, num=args.readers, start_method="fork")
    server.append_worker(Classify, max_batch_size=args.batch, max_wait_time=args.wait, start_method="fork")
    server.run()


def try_to_load(stage: Callable[[], object]) -> None:
    """Load the weights as a stage does, or end with what is wrong with them."""
    try:
        stage()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"server.py: error: {error}")


if __name__ == "__main__":
    main()
