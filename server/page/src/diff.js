// Which words of `text` are not in `reference`, by the longest common subsequence of words.

const MAX_WORDS = 1500; // the table is their product; beyond, only what both begin with is compared

export function difference(reference, text) {
  const ours = text.match(/\S+|\s+/g) ?? [];
  const words = ours.filter((piece) => piece.trim());
  const same = kept(reference.match(/\S+/g) ?? [], words);
  const pieces = [];
  let place = 0;
  for (const piece of ours) {
    const last = pieces.at(-1);
    // White space belongs to a difference if it goes on behind it.
    const differs = piece.trim() ? !same[place++] : Boolean(last?.differs && place < same.length && !same[place]);
    if (last && last.differs === differs) last.text += piece;
    else pieces.push({ text: piece, differs });
  }
  return pieces;
}

// For every word of `b` whether it is part of the longest common subsequence with `a`.
function kept(a, b) {
  const same = new Array(b.length).fill(false);
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) same[start++] = true;
  const left = a.slice(start);
  const right = b.slice(start);
  if (!left.length || !right.length || left.length > MAX_WORDS || right.length > MAX_WORDS) return same;
  const width = right.length + 1;
  const longest = new Uint16Array((left.length + 1) * width);
  for (let i = left.length - 1; i >= 0; i--) {
    for (let j = right.length - 1; j >= 0; j--) {
      longest[i * width + j] =
        left[i] === right[j]
          ? longest[(i + 1) * width + j + 1] + 1
          : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  for (let i = 0, j = 0; i < left.length && j < right.length;) {
    if (left[i] === right[j]) {
      same[start + j] = true;
      i++;
      j++;
    } else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
    else j++;
  }
  return same;
}
