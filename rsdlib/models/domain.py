"""Is a picture of the kind that a model was trained on? Its distance from them, calibrated."""

import numpy as np

from rsdlib.errors import BadValueError, refusing

_SPARED, _EACH = 0.98, 0.99  # shares of the validation pictures inside: of all, and of each view
_ROUNDING = 1.001  # stored features are rounded
_NO_ROWS = "are no finite rows of the known width: {}"


def texture(images):
    """Return how fine details are spread: what resizing, blurring and decoders leave behind.

    For each coefficient of the 4 x 4 cosine transform of the lightness: the mean logarithm of its
    magnitude, and the logarithm of its mean square.

    Parameters
    ----------
    images : ndarray (n, 3, s, s), uint8

    Returns
    -------
    ndarray (n, 32), float64
    """
    from scipy.fft import dctn

    n, side = len(images), images.shape[-1] // 4
    lightness = images[..., : 4 * side, : 4 * side].mean(axis=1, dtype=np.float32) / 255
    tiles = lightness.reshape(n, side, 4, side, 4).transpose(0, 1, 3, 2, 4)
    waves = dctn(tiles, axes=(3, 4), norm="ortho").reshape(n, side * side, 16)
    step = 0.1 / 255  # a tenth of what one step of a pixel makes
    magnitude = np.log(np.abs(waves) + step).mean(axis=1)
    power = np.log(np.square(waves).mean(axis=1) + (step / 10) ** 2)
    return np.concatenate([magnitude, power], axis=1).astype(np.float64)


class Domain:
    """The pictures that a model knows, each seen from several sides, such as features and texture.

    A picture's distance is its largest Mahalanobis distance over the views, each in units of what
    one validation picture in a hundred exceeds; scaled so that at most two validation pictures in a
    hundred lie beyond 1. Covariances are shrunk (Ledoit and Wolf, 2004).

    Parameters
    ----------
    arrays : dict of str to ndarray
        ``<view>.centre`` (p,), ``<view>.precision`` (p, p), ``<view>.scale``, and ``edge``: all
        that there is to store.
    """

    def __init__(self, arrays):
        self.arrays = arrays
        self.views = sorted({name.partition(".")[0] for name in arrays} - {"edge"})

    @classmethod
    def fit(cls, known, held):
        """Learn from training pictures, calibrated on validation pictures.

        Parameters
        ----------
        known, held : dict of str to ndarray (n, p)
            By view: of training, and of validation pictures.

        Returns
        -------
        Domain
        """
        from sklearn.covariance import LedoitWolf

        arrays = {"edge": 1.0}
        for view, rows in known.items():
            with refusing(ValueError, BadValueError, f"{view} {_NO_ROWS}"):
                fitted = LedoitWolf(store_precision=False).fit(np.asarray(rows, np.float64))
            spread = fitted.covariance_
            noise = 1e-4 * spread.trace() / len(spread) + 1e-6  # flat pictures have one texture
            precision = np.linalg.inv(spread + noise * np.eye(len(spread)))
            learnt = {"centre": fitted.location_, "precision": precision, "scale": 1.0}
            arrays |= {f"{view}.{name}": np.float32(value) for name, value in learnt.items()}
        domain = cls(arrays)
        for view, rows in held.items():
            arrays[f"{view}.scale"] = np.float32(_quantile(domain._distance(view, rows), _EACH))
        arrays["edge"] = np.float32(_quantile(domain.distance(held), _SPARED) * _ROUNDING)
        return domain

    def distance(self, views):
        """Return how far pictures lie: (n,), above 1 outside.

        Parameters
        ----------
        views : dict of str to ndarray (n, p)
        """
        distances = [self._distance(view, views[view]) for view in self.views]
        return np.max(distances, axis=0) / self.arrays["edge"]

    def _distance(self, view, rows):
        from sklearn.utils import check_array

        with refusing(ValueError, BadValueError, f"{view} {_NO_ROWS}"):
            centred = check_array(rows, dtype=np.float64) - self.arrays[f"{view}.centre"]
        squared = np.einsum("np,np->n", centred @ self.arrays[f"{view}.precision"], centred)
        return np.sqrt(np.maximum(squared, 0)) / self.arrays[f"{view}.scale"]


def _quantile(distances, share):
    return max(np.quantile(distances, share, method="higher"), 1e-6)
