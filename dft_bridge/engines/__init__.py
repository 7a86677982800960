"""DFT engines behind one small interface (:class:`dft_bridge.engines.base.Engine`)."""
