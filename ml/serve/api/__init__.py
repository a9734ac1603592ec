"""An HTTP server that speaks OpenAI's interface, over one `ml.serve.Engine`."""
