"""A residual network in NumPy and float64, from the paper and torchvision's layer list; shares no code with ml/."""

import numpy as np


def convolved(x, kernel, stride):
    """``x [n, h, w, in]``, ``kernel [k, k, in, out]``, padded by ``k // 2`` on each side."""
    k = kernel.shape[0]
    x = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    height, width = (x.shape[1] - k) // stride + 1, (x.shape[2] - k) // stride + 1
    y = np.zeros((x.shape[0], height, width, kernel.shape[3]))
    for row in range(height):
        for column in range(width):
            patch = x[:, row * stride : row * stride + k, column * stride : column * stride + k]
            y[:, row, column] = np.tensordot(patch, kernel, 3)
    return y


def pooled(x):
    """The largest of each 3x3, with stride 2."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    height, width = (x.shape[1] - 3) // 2 + 1, (x.shape[2] - 3) // 2 + 1
    parts = [x[:, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3].max((1, 2)) for r in range(height) for c in range(width)]
    return np.stack(parts, 1).reshape(x.shape[0], height, width, -1)


class Reference:
    """Runs a network; ``moments`` are the statistics of the batch, by path, where it has none to go by."""

    def __init__(self, params, config, statistics=None):
        self.params, self.config, self.statistics, self.moments = params, config, statistics, {}

    def norm(self, x, *path):
        p = self._at(self.params, path)
        if self.statistics is None:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            self.moments[path] = mean, var
        else:
            s = self._at(self.statistics, path)
            mean, var = np.float64(s["mean"]), np.float64(s["var"])
        return (x - mean) / np.sqrt(var + self.config.batch_norm_eps) * np.float64(p["scale"]) + np.float64(p["bias"])

    def conv(self, x, stride, *path):
        return convolved(x, np.float64(self._at(self.params, path)["kernel"]), stride)

    def __call__(self, pixels):
        c = self.config
        x = (pixels / 255 - np.array(c.pixel_mean)) / np.array(c.pixel_std)
        x = np.maximum(self.norm(self.conv(x, 2 if c.stem == "imagenet" else 1, "stem"), "stem_norm"), 0)
        x = pooled(x) if c.stem == "imagenet" else x
        for stage, count in enumerate(c.blocks):
            for number in range(count):
                x = self.block(x, 2 if stage and not number else 1, f"stage{stage}_block{number}")
        return x.mean((1, 2)) @ np.float64(self.params["kernel"]) + np.float64(self.params["bias"])

    def block(self, x, stride, name):
        y = x
        strides = (1, stride, 1) if self.config.bottleneck else (stride, 1)  # v1.5: at the 3x3
        for number, one in enumerate(strides, 1):
            y = self.norm(self.conv(y, one, name, f"conv{number}"), name, f"norm{number}")
            y = np.maximum(y, 0) if number < len(strides) else y
        if "projection" in self.params[name]:
            x = self.norm(self.conv(x, stride, name, "projection"), name, "projection_norm")
        return np.maximum(x + y, 0)

    @staticmethod
    def _at(tree, path):
        for key in path:
            tree = tree[key]
        return tree
