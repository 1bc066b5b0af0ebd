"""What strangers do to an upload, by accident and on purpose. Each mutation belongs to a layer of the draft.

A mutation changes the draft in place and may leave it valid. Its name says in a reproducer what was done.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz import containers, content, files
from tests.fuzz.uploads import Draft

Mutation = Callable[[Draft], None]

CONTENT: tuple[Mutation, ...] = (
    content.drop_tensor,
    content.swap_tensors,
    content.add_tensor,
    content.reshape_tensor,
    content.cast_tensor,
    content.poison_tensor,
    content.set_field,
    content.set_field,
    content.drop_field,
    content.tune_field,
    content.tune_field,
    content.shuffle_config,
)
FILE: tuple[Mutation, ...] = (
    files.edit_header,
    files.edit_header,
    files.retype_header,
    files.set_length,
    files.retype_config,
    files.drop_file,
    files.other_format,
    files.damage_file,
    files.damage_file,
)
MEMBER: tuple[Mutation, ...] = (
    containers.rename_member,
    containers.add_member,
    containers.relink_member,
    containers.extend_member,
    containers.swap_contents,
    containers.many_members,
    containers.shuffle_members,
)
BYTES: tuple[Mutation, ...] = (
    containers.damage_archive,
    containers.damage_archive,
    containers.edit_number,
    containers.edit_number,
    containers.wrap_archive,
)


def mutate(draft: Draft) -> list[str]:
    """Bring the draft to its final bytes, with none to four mutations on the way; their names."""
    random = draft.random
    layers = (CONTENT, FILE, MEMBER, BYTES) if draft.is_archive else (CONTENT, FILE)
    count = random.choices((0, 1, 2, 3, 4), (5, 50, 25, 12, 8))[0]
    chosen = [
        (layer, random.choice(layers[layer])) for layer in sorted(random.choices(range(len(layers)), k=count))
    ]
    finish = (
        (draft.serialize, draft.enlist, draft.pack, lambda: None)
        if draft.is_archive
        else (draft.serialize, lambda: None)
    )
    for layer in range(len(layers)):
        for at, mutation in chosen:
            if at == layer:
                mutation(draft)
        finish[layer]()
    return [mutation.__name__ for _, mutation in chosen]
