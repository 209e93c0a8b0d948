"""Models over stores: run without gradients, batch after batch."""

import contextlib

import numpy as np

from rsdlib import files, runtime
from rsdlib.errors import DeviceError


def weights_key(model):
    """Return a key that changes with any weight of the model."""
    arrays = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    return files.checksum(arrays)[:16]


@contextlib.contextmanager
def evaluating(model):
    """Put `model` into evaluation mode without gradients, and back."""
    import torch

    with torch.inference_mode(), contextlib.ExitStack() as stack:
        stack.callback(model.train, model.training)  # back to the mode it is in
        yield model.eval()


class Forward:
    """A model run on arrays without gradients: float32, but bfloat16 on GPUs that compute in it.

    Where a GPU's memory does not hold a batch, batches are halved from then on.

    Parameters
    ----------
    model : nn.Module
        Moved to the device. Of several outputs the first counts.
    on : torch.device
    """

    def __init__(self, model, on):
        self.model, self.on, self._size = model.to(on), on, None

    def __call__(self, inputs):
        """Return the answers (n, p), float32, to an array (n, ...)."""
        import torch

        fast = self.on.type == "cuda" and runtime.precision("auto", self.on) == "bf16"
        outputs, size = [], self._size or len(inputs)
        with evaluating(self.model), torch.autocast(self.on.type, torch.bfloat16, enabled=fast):
            while len(inputs):
                try:
                    output = self.model(torch.from_numpy(inputs[:size]).to(self.on))
                    output = output[0] if isinstance(output, tuple) else output
                    outputs.append(output.float().cpu().numpy())
                    inputs = inputs[size:]
                except torch.OutOfMemoryError as error:
                    if size == 1:
                        raise DeviceError(f"{self.on} has too little memory for one row") from error
                    if self._size is None:
                        runtime.log(f"{self.on} has too little memory for {size} rows: halved")
                    size = self._size = size // 2
        return np.concatenate(outputs)


def apply(model, store, rows, *, device="auto", batch_size=256, description="predicting"):
    """Map `model` over the inputs of `rows` in batches, see `Forward`.

    Parameters
    ----------
    model : nn.Module
        Moved to the device.
    store : any store
    rows : array of int (n,)
    device : str
    batch_size : int
    description : str
        What the progress bar says.

    Returns
    -------
    ndarray (n, p), float32

    Raises
    ------
    DeviceError
        The memory does not hold a single row.
    """
    run = Forward(model, runtime.device(device))
    parts = np.split(np.asarray(rows), range(batch_size, len(rows), batch_size))
    return np.concatenate([run(store.batch(p)) for p in runtime.track(parts, description)])
