"""Runs sequences of different lengths in one batch, three ways, with the same results.

    python examples/varlen.py

In a padded batch, nn.GRU's reverse direction starts in the padding. A PackedSequence avoids that; `lengths=` gives the
same without packing and unpacking.
"""

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from bigru import BiGRU


def main() -> None:
    torch.manual_seed(0)
    gru = BiGRU(8, 16, batch_first=True)
    sequences = [torch.randn(length, 8) for length in (5, 12, 1, 9)]
    lengths = [len(sequence) for sequence in sequences]
    padded = pad_sequence(sequences, batch_first=True)  # (4, 12, 8)

    y, h_n = gru(padded, lengths=lengths)
    print(f"lengths=: y {tuple(y.shape)}, zero past each end; h_n {tuple(h_n.shape)}")

    packed, packed_h_n = gru(pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False))
    unpacked, _ = pad_packed_sequence(packed, batch_first=True)
    torch.testing.assert_close(y, unpacked)
    torch.testing.assert_close(h_n, packed_h_n)

    for number, sequence in enumerate(sequences):
        alone, alone_h_n = gru(sequence)
        torch.testing.assert_close(y[number, : len(sequence)], alone)
        torch.testing.assert_close(h_n[:, number], alone_h_n)
    print("a PackedSequence and each sequence alone give the same")

    wrong, _ = gru(padded)
    print(f"without lengths the padding is read: y of the shortest is off by {(wrong - y)[2, 0].abs().max():.2f}")


if __name__ == "__main__":
    main()
