"""Fill in the masks of a text with the pre-training model itself, whatever its method.

An exported encoder of a late method has no head; here the masks join where they joined in training. The
text is read as an exported tokenizer reads it: <mask> stands for a token, and takes the space before it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer as JsonTokenizer

from pretrain.errors import UserError
from pretrain.model.late_mask import LateMaskModel
from tools.export.tokenizer import hugging_face_tokenizer
from tools.shared import console
from tools.shared.run_model import load_model, mask_logits

TOP = 5


@torch.no_grad()
def fill_mask(
    model: LateMaskModel, tokenizer: JsonTokenizer, text: str, top: int = TOP
) -> list[list[dict[str, Any]]]:
    """Return for each mask of `text` the `top` pieces as transformers' pipeline reports them.

    tokenizer: of `hugging_face_tokenizer`. Each answer has score, token, token_str and sequence, where
    the other masks stay. UserError if the text has no mask or too many tokens.
    """
    ids = torch.tensor(tokenizer.encode(text).ids)
    masked = ids == model.mask_id
    mask = tokenizer.id_to_token(model.mask_id)
    if not masked.any():
        raise UserError(f"{text!r}: has no {mask}; put one where a word is to be filled in")
    if len(ids) > model.m.max_positions:
        raise UserError(
            f"the text has {len(ids)} tokens, the model {model.m.max_positions} positions; cut it"
        )
    shares = mask_logits(model.eval(), ids[None])[0].softmax(-1)
    scores, pieces = shares.topk(min(top, shares.shape[-1]))
    places = masked.nonzero().flatten().tolist()
    return [
        [_answer(tokenizer, ids, place, token, score) for score, token in zip(*pair, strict=True)]
        for place, *pair in zip(places, scores.tolist(), pieces.tolist(), strict=True)
    ]


def _answer(
    tokenizer: JsonTokenizer, ids: torch.Tensor, place: int, token: int, score: float
) -> dict[str, Any]:
    filled = ids[1:-1].tolist()
    filled[place - 1] = token
    return {
        "score": score,
        "token": token,
        "token_str": tokenizer.decode([token]),
        "sequence": tokenizer.decode(filled, skip_special_tokens=False),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("fill_mask", "Fill in the masks of a text", reports=True)
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("text", metavar="TEXT", help='such as "The weather is <mask> today."')
    console.add_checkpoint(parser)
    parser.add_argument("--top", type=console.whole(1), default=TOP, help="answers per mask (%(default)s)")
    args = parser.parse_args(arguments)
    model, _, ours, _ = load_model(args.run, args.checkpoint)
    tokenizer = hugging_face_tokenizer(ours)
    answers = fill_mask(model, tokenizer, args.text, args.top)
    if args.json:
        console.print_json(answers)
    else:
        print("\n\n".join("\n".join(map(_line, group)) for group in answers))
    return 0


def _line(answer: dict[str, Any]) -> str:
    return f"{answer['score']:7.2%}  {answer['token_str']!r:16} {answer['sequence']}"


if __name__ == "__main__":
    console.run(main)
