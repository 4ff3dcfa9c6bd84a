"""Routes of text-embeddings-inference, and the rerank routes of Jina and Cohere."""
