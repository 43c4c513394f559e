"""The transformer decoder of Mask2Former: queries that look at what their own masks cover."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcache.heads.parts.attention import Attention
from fcache.heads.parts.conv import resize
from fcache.heads.parts.positions import sine_positions


class QueryBlock(nn.Module):
    """Masked attention to a level, attention among the queries, a perceptron; each is added and then normalised."""

    def __init__(self, width: int, *, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.look = Attention(width, heads=heads, dropout=dropout)
        self.look_norm = nn.LayerNorm(width)
        self.talk = Attention(width, heads=heads, dropout=dropout)
        self.talk_norm = nn.LayerNorm(width)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.expand, self.contract):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor, names: Tensor, level: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Queries [B, Q, width] -> [B, Q, width].

        `names` [Q, width] tell queries apart; the level's places are [B, N, width], their positions [N, width];
        `visible`, bool [B, Q, N], says which places a query may look at.
        """
        x = self.look_norm(x + self.dropout(self.look(x + names, level + positions, level, visible)))
        x = self.talk_norm(x + self.dropout(self.talk(x + names, x + names, x)))
        return self.norm(x + self.dropout(self.contract(self.dropout(F.relu(self.expand(x))))))


class MaskDecoder(nn.Module):
    """Learned queries that pass `blocks` blocks over the levels in turn; each gives a class and a mask embedding.

    A mask is the product of its embedding with the mask features. Classes and embeddings are read before the first
    block and after each, which makes blocks + 1 outputs: papers write (3+1) and (9+1). A block's queries look only at
    places that their last mask covers, or everywhere if it covers none.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        levels: int,
        queries: int,
        heads: int,
        blocks: int,
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.queries = nn.Embedding(queries, width)
        self.query_names = nn.Embedding(queries, width)
        self.level_names = nn.Embedding(levels, width)
        self.blocks = nn.ModuleList(
            QueryBlock(width, heads=heads, hidden=hidden, dropout=dropout) for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, num_classes + 1)
        self.embed = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, levels: Sequence[Tensor], features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Levels [B, width, h, w] and mask features [B, width, H, W] -> blocks + 1 outputs.

        Of each the class logits [B, Q, K + 1], whose last class is "no object", and the mask embeddings [B, Q, width].
        """
        sizes = [(x.shape[2], x.shape[3]) for x in levels]
        device, dtype, width = features.device, features.dtype, features.shape[1]
        positions = [sine_positions(size, width, device=device, dtype=dtype) for size in sizes]
        places = [x.flatten(2).transpose(1, 2) + n for x, n in zip(levels, self.level_names.weight, strict=True)]
        # Resizing and the product with an embedding are both linear, and maps of features are resized only once.
        coarse = [resize(features.detach(), size).flatten(2) for size in sizes]
        x = self.queries.weight.expand(len(features), -1, -1)
        classes, embeddings = [], []
        for index in range(len(self.blocks) + 1):
            state = self.norm(x)
            classes.append(self.classify(state))
            embeddings.append(self.embed(state))
            if index < len(self.blocks):
                turn = index % len(levels)
                visible = covered(embeddings[-1], coarse[turn])
                x = self.blocks[index](x, self.query_names.weight, places[turn], positions[turn], visible)
        return classes, embeddings


@torch.no_grad()
def covered(embeddings: Tensor, features: Tensor) -> Tensor:
    """Bool [B, Q, N]: where the masks of embeddings [B, Q, C] cover the places [B, C, N]; all if they cover none."""
    with torch.autocast(features.device.type, enabled=False):
        inside = embeddings.to(features.dtype) @ features >= 0
    return inside | ~inside.any(dim=-1, keepdim=True)
