"""What structured linear layers share: products of block-diagonal factors, and their exchange for nn.Linear.

Shape suffixes: N rows of the input, K blocks of the first factor, L blocks of the second, P and Q columns and rows of a
block of the first, R and S columns and rows of a block of the second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trimtab.errors import UsageError


class StructuredLinear(nn.Module):
    """A linear layer whose matrix M is a product of factors: y = M x + b.

    Args:
        in_features: width of the input, at least 1.
        out_features: width of the output, at least 1.
        bias: whether to learn b.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        UsageError: if a width is below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if min(in_features, out_features) < 1:
            raise UsageError(f"a linear layer's widths must be at least 1, got {in_features} and {out_features}.")
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def multiply(self, x: Tensor) -> Tensor:
        """Return M x."""
        raise NotImplementedError

    def project_(self, weight: Tensor) -> None:
        """Set the factors so that M is the matrix of this structure nearest to `weight` in the Frobenius norm."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """Return M, [out, in], as a function of the factors."""
        like = next(self.parameters())
        with torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False):
            return self.multiply(torch.eye(self.in_features, device=like.device, dtype=like.dtype)).mT

    @property
    def weight(self) -> Tensor:
        """The layer as one dense matrix, [out, in], for code that reads the weight of an nn.Linear."""
        return self.matrix()

    def forward(self, x: Tensor) -> Tensor:
        """Return M x + b, with the input's leading dimensions."""
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Return the widths and the shapes of the factors."""
        factors = ", ".join(
            f"{name}={tuple(p.shape)}" for name, p in self.named_parameters(recurse=False) if name != "bias"
        )
        widths = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{widths}, {factors}, bias={self.bias is not None}"

    def factor_count(self) -> int:
        """Return the number of values in the factors, which is also that of multiplications for a row of the input."""
        return sum(p.numel() for name, p in self.named_parameters(recurse=False) if name not in ("bias", "guide"))

    def to_linear(self) -> nn.Linear:
        """Return an nn.Linear that computes the same function."""
        weight = self.weight.detach()
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta", dtype=weight.dtype
        )
        trained = any(p.requires_grad for name, p in self.named_parameters(recurse=False) if name != "bias")
        linear.weight = nn.Parameter(weight.contiguous(), requires_grad=trained)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)


def working(weight: Tensor) -> Tensor:
    """Return a weight without its graph in a dtype that has singular values: float32 or wider."""
    weight = weight.detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def factorize(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U sqrt(S) and sqrt(S) V^T of the first `rank` singular triplets of each matrix.

    Where S is 0 the second has V^T itself: two factors of 0 would have no gradient, ever.
    """
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    root = s[..., :rank].sqrt()
    right = torch.where(root > 0, root, torch.ones_like(root))
    return u[..., :rank] * root.unsqueeze(-2), right.unsqueeze(-1) * vh[..., :rank, :]


def block_diagonal(x: Tensor, blocks_KQP: Tensor) -> Tensor:
    """Return a block-diagonal matrix times x: [..., K * P] to [..., K * Q]."""
    k, q, p = blocks_KQP.shape
    x_KNP = x.reshape(-1, k, p).transpose(0, 1)
    return torch.bmm(x_KNP, blocks_KQP.mT).transpose(0, 1).reshape(*x.shape[:-1], k * q)


def shuffle_shapes(in_size: int, out_size: int, blocks: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the shapes of the two factors of a square number of links: the inner width is the smaller of both."""
    p, s = in_size // blocks, out_size // blocks
    q = min(p, s)
    return (blocks, q, p), (blocks, s, q)


def block_shuffle(x: Tensor, first_KQP: Tensor, second_LSR: Tensor) -> Tensor:
    """Return P2 B2 P1 B1 x: [..., K * P] to [..., S * L], with B1 and B2 block-diagonal.

    P1 deals the K * Q inner values out to the L blocks of B2 in turn, and P2 takes the outputs of these blocks in turn.
    """
    targets, s, r = second_LSR.shape
    z_NRL = block_diagonal(x, first_KQP).reshape(-1, r, targets)
    y_LNS = torch.bmm(z_NRL.permute(2, 0, 1), second_LSR.mT)
    return y_LNS.permute(1, 2, 0).reshape(*x.shape[:-1], s * targets)


def project_block_shuffle(
    weight: Tensor, first: tuple[int, int, int], second: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Return the factors of `block_shuffle` whose product is nearest to a matrix [S * L, K * P].

    Block k of the input reaches block l of the output through the inner values that the first makes and the second
    takes, so that their submatrix has that many as its rank; every entry is in one submatrix, so that the truncated
    SVD of each is the optimum.
    """
    (k, q, p), (targets, s, r) = first, second
    blocks_KLSP = weight.view(s, targets, k, p).permute(2, 1, 0, 3)
    u_KLST, v_KLTP = factorize(blocks_KLSP, -(-q // targets))
    inner = torch.arange(k * q, device=weight.device)
    source, target, triplet = inner // q, inner % targets, inner % q // targets
    second_RLS = u_KLST[source, target, :, triplet].view(r, targets, s)
    return v_KLTP[source, target, triplet].view(k, q, p), second_RLS.permute(1, 2, 0)


def own_weight(model: nn.Module) -> set[int]:
    """Return the ids of the plain nn.Linear modules of a model that another module can replace.

    No other module shares their weight, and nothing hangs on them: hooks and norms or gates that other methods have put
    there would be lost with the module.
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {
        id(module)
        for module in model.modules()
        if type(module) is nn.Linear
        and owners[id(module.weight)] == 1
        and not (module._modules or module._forward_hooks or module._forward_pre_hooks)
    }


def check_whole(method: str, name: str, linear: nn.Linear) -> None:
    """Refuse a weight whose values are not here.

    Raises:
        UsageError: if the weight is sharded or on the meta device.
    """
    if hasattr(linear.weight, "full_tensor") or linear.weight.is_meta:
        what = "on the meta device" if linear.weight.is_meta else "sharded already"
        raise UsageError(f"{method}: {name!r} is {what}: apply it to the whole weight.")


def swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of some, wherever the model has them; factors of frozen weights are frozen."""
    for old, new in replacements.items():
        if not old.weight.requires_grad:
            for name, parameter in new.named_parameters():
                if name != "bias":
                    parameter.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def densify(model: nn.Module, kinds: tuple[type[StructuredLinear], ...]) -> dict[str, str]:
    """Turn structured layers into nn.Linear modules of the same function, and say which."""
    found = {name: module for name, module in model.named_modules() if type(module) in kinds and name}
    swap(model, {module: module.to_linear() for module in found.values()})
    return dict.fromkeys(found, "nn.Linear of the same function")
