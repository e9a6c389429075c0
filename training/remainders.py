"""What a bucket has left over after its full micro-batches, moved into free places of other buckets (`merge`).

Pure functions, no torch. The other choice, a smaller micro-batch, needs no code.
"""

from collections.abc import Mapping

from training.buckets import Bucket, Placement, placement_in, ratio_distance
from training.showings import Fit, PlannedSample

Members = list[tuple[PlannedSample, Placement]]


def merge_remainders(
    remainders: Mapping[Bucket, Members],
    fits: Mapping[PlannedSample, Fit],
    *,
    micro_batch_size: int,
    max_crop_loss: float,
    may_enlarge: bool,
) -> dict[Bucket, Members]:
    """Return the remainders after dissolving the smallest into free places of others; each moves whole or not at all.

    A remainder that has received stays. No image loses more than max_crop_loss of its area on top of what its own
    bucket costs, or goes to a bucket smaller by more than that.
    """
    rest = {bucket: list(members) for bucket, members in remainders.items()}
    receivers: set[Bucket] = set()
    for bucket in sorted(rest, key=lambda b: (len(rest[b]), b)):
        if bucket in receivers:
            continue
        free = {b: micro_batch_size - len(members) for b, members in rest.items() if b != bucket}
        moves: list[tuple[Bucket, PlannedSample, Placement]] = []
        for sample, own in rest[bucket]:
            size = fits[sample]
            for other in _nearest_first(size, free):
                placed = placement_in(size.width, size.height, other)
                is_enlarged = placed.resized_width > size.width or placed.resized_height > size.height
                extra = placed.crop_loss_fraction - own.crop_loss_fraction
                # A small bucket of the same ratio costs no crop, but most of the pixels.
                fewer = 1 - other.width * other.height / (bucket.width * bucket.height)
                if max(extra, fewer) <= max_crop_loss and (may_enlarge or not is_enlarged):
                    moves.append((other, sample, placed))
                    free[other] -= 1
                    break
        if len(moves) == len(rest[bucket]):
            del rest[bucket]
            for other, sample, placed in moves:
                rest[other].append((sample, placed))
                receivers.add(other)
    return rest


def _nearest_first(size: Fit, free: Mapping[Bucket, int]) -> list[Bucket]:
    return sorted((b for b, n in free.items() if n), key=lambda b: (ratio_distance(size.width, size.height, b), b))
