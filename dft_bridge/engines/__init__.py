"""DFT engines behind one small interface (:class:`crystaljax.dft_bridge.engines.base.Engine`)."""
