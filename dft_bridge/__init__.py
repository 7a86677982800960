"""From finished crystals to real DFT numbers: the gate, the bridge, the store and the engines."""
