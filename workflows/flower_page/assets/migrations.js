/* Keeps the live part of a page current: fetches it again and changes only what differs, so nothing flickers and
   nothing is lost that is hovered, focused or selected. A tab that nobody sees asks nothing. */
(function () {
    "use strict";

    const POLL_MS = 1500;
    const SLOWEST_POLL_MS = 12000;  // after failures, each of which doubles the pause
    const DEADLINE_MS = 10000;

    const live = document.getElementById("migrations-live");
    const trouble = document.getElementById("migrations-trouble");
    const dot = document.getElementById("migrations-dot");
    const updated = document.getElementById("migrations-updated");
    const source = document.getElementById("migrations-status").dataset.source;

    let timer = null;
    let asking = false;
    let pauseMs = POLL_MS;
    let shown = null;

    async function ask() {
        const response = await fetch(source, {cache: "no-cache", signal: AbortSignal.timeout(DEADLINE_MS)});
        const isJson = (response.headers.get("Content-Type") || "").startsWith("application/json");
        const answer = isJson ? await response.json() : {};
        if (!response.ok || answer.html === undefined) {
            const lost = response.redirected || response.status === 401 || response.status === 403;
            throw new Error(answer.error || (lost
                ? "Flower wants you to log in again: reload this page."
                : "Flower answered " + response.status + ": reload this page, or look into Flower's log."));
        }
        return answer.html;
    }

    async function poll() {
        if (asking || document.hidden) {
            return;
        }
        asking = true;
        clearTimeout(timer);
        try {
            const html = await ask();
            if (html !== shown) {
                const fresh = live.cloneNode(false);
                fresh.innerHTML = html;  // rendered and escaped by Flower, as the page itself was
                morphChildren(live, fresh);
                shown = html;
            }
            pauseMs = POLL_MS;
            report("Updated " + new Date().toLocaleTimeString(), "");
        } catch (error) {
            pauseMs = Math.min(pauseMs * 2, SLOWEST_POLL_MS);
            const isNetwork = error instanceof TypeError || error.name === "TimeoutError";
            report("Update failed", isNetwork ? "Flower does not answer. Trying again." : error.message);
        } finally {
            asking = false;
            timer = document.hidden ? null : setTimeout(poll, pauseMs);
        }
    }

    function report(state, words) {
        updated.textContent = state;
        trouble.textContent = words;
        trouble.classList.toggle("d-none", !words);
        live.classList.toggle("migrations-stale", Boolean(words));
        dot.classList.toggle("status-dot-live", !words);
        dot.classList.toggle("status-dot-error", Boolean(words));
    }

    /* Makes `old` equal to `fresh`, keeping the nodes that are the same. Elements with an id are found by it wherever
       they went; others are compared by position. */
    function morph(old, fresh) {
        if (old.isEqualNode(fresh)) {
            return;
        }
        if (old.nodeName !== fresh.nodeName) {
            old.replaceWith(fresh);
        } else if (old.nodeType !== Node.ELEMENT_NODE) {
            old.nodeValue = fresh.nodeValue;
        } else {
            for (const {name} of Array.from(old.attributes)) {
                if (!fresh.hasAttribute(name)) {
                    old.removeAttribute(name);
                }
            }
            for (const {name, value} of Array.from(fresh.attributes)) {
                if (old.getAttribute(name) !== value) {
                    old.setAttribute(name, value);
                }
            }
            morphChildren(old, fresh);
        }
    }

    function morphChildren(old, fresh) {
        const kept = new Map(Array.from(old.children).filter((child) => child.id).map((child) => [child.id, child]));
        let place = old.firstChild;
        for (const child of Array.from(fresh.childNodes)) {
            let same = child.id ? kept.get(child.id) : place;
            if (!child.id && place && place.id) {
                same = undefined;  // that one belongs to another
            }
            if (!same) {
                old.insertBefore(child, place);
            } else {
                if (same === place) {
                    place = place.nextSibling;
                } else {
                    old.insertBefore(same, place);
                }
                morph(same, child);
            }
        }
        while (place) {
            const next = place.nextSibling;
            place.remove();
            place = next;
        }
    }

    document.addEventListener("visibilitychange", function () {
        clearTimeout(timer);
        if (!document.hidden) {
            pauseMs = POLL_MS;
            poll();
        }
    });
    timer = setTimeout(poll, POLL_MS);
})();
