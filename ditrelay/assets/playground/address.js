// Where the server is: beside the page, which may be served under a path such as /draw/.

export const base = new URL(".", document.baseURI);

/** The address of `path` (without a slash before it) on the page's server. */
export const addressOf = (path) => new URL(path, base);

/** The path of a file that the server names: it may not know under which path the page sees it. */
export function pathOfFile(url) {
  const { pathname } = new URL(url, base);
  return /v1\/(images|videos)\/[^/]+\/content$/.exec(pathname)?.[0] ?? pathname;
}
