/*
 * Browsers start no Worker for a page that is opened from disk (file://). The search of the site
 * needs one, so this script replaces Worker there by a hidden frame that runs the same script.
 */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.onmessage = null
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inner = (this.inner = frame.contentWindow)

      inner.postMessage = data => {
        const event = new MessageEvent("message", { data })
        this.dispatchEvent(event)
        if (this.onmessage) this.onmessage(event)
      }
      inner.importScripts = (...urls) => Promise.all(urls.map(each => load(inner, each, url)))
      load(inner, url, document.baseURI).then(() => {
        const waiting = this.waiting
        this.waiting = null
        waiting.forEach(data => this.postMessage(data))
      })
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data)
      else this.inner.dispatchEvent(new this.inner.MessageEvent("message", { data }))
    }

    terminate() {
      this.inner.frameElement.remove()
    }
  }

  function load(inner, url, base) {
    return new Promise((done, failed) => {
      const script = inner.document.createElement("script")
      script.src = new URL(url, base)
      script.onload = done
      script.onerror = failed
      inner.document.body.append(script)
    })
  }
}
