"""The clauses that the judge decides, each with its sentence, as a failing port is told it.

docs/semantics.md says of each what the sentence leaves open.
"""

from __future__ import annotations

#: Changes whenever a clause or a switch is added, removed or means something else.
SPEC_VERSION = "6"

CLAUSES = {
    "A1": "out = sum_j P_j v_j and lse = log sum_j mult_j exp(s_j), where P_j = mult_j "
    "exp(s_j) / sum, s_j = scale q.k_j, and query head h reads kv head h // G.",
    "A2": "A row that sees no key gives out = 0 and lse = -inf (or what the declared "
    "empty_row and empty_lse say), and all of its gradients are exactly 0.",
    "A3": "dq = scale sum_j dS_j k_j, dk = scale sum dS q and dv = sum P dO over the group's heads "
    "and all queries that see the key, with dS = P (dP - D + dlse).",
    "A4": "No gradient flows through the choice of blocks.",
    "A5": "A key that is invisible has no influence: whatever finite values it holds, nothing else "
    "changes, and its own gradients are exactly 0.",
    "W1": "Causal sliding window: key j is visible iff 0 <= p - j <= w, that is w + 1 keys "
    "(w keys if window_closed is False), where p = t + kv_len - q_len.",
    "W2": "Non-causal sliding window: key j is visible iff |p - j| <= w and p >= 0.",
    "W3": "w = 0 shows the own key only; w >= kv_len is full causal attention.",
    "C1": "Compressed block i covers tokens [i d, i d + l), incomplete windows dropped "
    '(alignment "start"), or [(i+1) d - l, (i+1) d) with zeros left of token 0 ("end").',
    "C2": "Compressed block i is visible iff its last token is <= p (< p if compress_strict).",
    "C3": "Memory columns stand before the blocks and are always visible; without causality all "
    "blocks are visible.",
    "C4": "A compressed key is the map (mean, linear, linear for each kv head, or MLP, with "
    "intra-block positions) of its window's tokens; gradients reach the tokens and the weights.",
    "F1": "Key j is visible iff its block j // l' is selected for (t, kv head) and j <= p.",
    "F2": "The last block may be short, is selectable, and attends only real tokens.",
    "F3": "A block selected twice counts once (twice if duplicates is multiset).",
    "F4": "Non-causal: the selected blocks only, with no cut, and nothing for rows with p < 0.",
    "I1": "p_cmp is a softmax over the visible compressed blocks and the memory columns; memory "
    "is no candidate.",
    "I2": "The importance of block b sums p_cmp[i] times the number of strides that window i and "
    "block b share (eq. 9).",
    "I3": "Scores are summed over the query heads of the group (eq. 10); with logit_mean they are "
    "a softmax of means of scaled logits.",
    "I4": "The n best blocks among those that begin at or before p, initial and local blocks "
    "forced and counted in n (the lowest, if more than n are forced).",
    "I5": "Between equal scores any choice is right, but only among the candidates.",
    "I6": "Fewer than n candidates: all of them, -1 in the slots left over; indices < 0 or >= the "
    "number of blocks are ignored.",
    "G1": "The layer is the sum over compress, fine and sliding of sigmoid(gate) times attention, "
    "one gate per branch, token and query head (eq. 5), with gradients to x and every weight.",
    "G2": "Rotary embedding, where the switch says so, turns pairs (2i, 2i + 1) of q and k of the "
    'fine and sliding branches by their positions; of the compressed one only with "all", once k '
    'is pooled, or "before_pooling", as tokens.',
    "G3": "Decoding with a cache equals the same row of the parallel form, at every step, from the "
    "first token, with memory.",
    "G4": "Sequences of different lengths in one batch (cu_seqlens) equal each of them by itself, "
    "with all gradients; those of the weights are summed over the sequences.",
}
