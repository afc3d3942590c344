/* What a checker of accessibility looks at, on the page as it is: a list of faults. */
() => {
  const faults = [];
  const told = (element) => `<${element.tagName.toLowerCase()} ${element.id || element.className?.baseVal || element.className || ''}>`;
  const shown = (element) => element.checkVisibility({ visibilityProperty: true }) && element.getClientRects().length > 0;

  const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const channels = (colour) => { // any CSS colour as red, green, blue and alpha
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
    return [red, green, blue, alpha / 255];
  };
  const over = (front, back) => front.slice(0, 3).map((value, i) => value * front[3] + back[i] * (1 - front[3]));
  const background = (element) => {
    const layers = [];
    for (let node = element; node; node = node.parentElement) layers.push(channels(getComputedStyle(node).backgroundColor));
    return layers.reverse().reduce((back, front) => over(front, back), [255, 255, 255]);
  };
  const luminance = (colour) => {
    const [red, green, blue] = colour.map((value) => value / 255).map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const check = (element, colour, least, what) => {
    const back = background(element);
    const ratio = contrast(over(channels(colour), back), back);
    if (ratio < least) faults.push(`contrast ${ratio.toFixed(2)} of ${what} in ${told(element)}`);
  };

  let texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !shown(element)) continue;
    texts += 1;
    const style = getComputedStyle(element);
    check(element, element instanceof SVGElement ? style.fill : style.color, 4.5, `"${walker.currentNode.data.trim().slice(0, 30)}"`);
  }
  for (const curve of document.querySelectorAll('.curve:not(.raw), .swatch line')) {
    if (shown(curve) && getComputedStyle(curve).stroke !== 'rgba(0, 0, 0, 0)') check(curve.closest('section, li'), getComputedStyle(curve).stroke, 3, 'a curve');
  }
  for (const control of document.querySelectorAll('button, input, select, textarea, summary, a[href]')) {
    if (!shown(control)) continue;
    if (['INPUT', 'SELECT', 'TEXTAREA'].includes(control.tagName) && control.type !== 'range') check(control.parentElement, getComputedStyle(control).borderTopColor, 3, 'a border');
    const { width, height } = control.getBoundingClientRect();
    const target = control.closest('label')?.getBoundingClientRect() ?? { height };
    if (!control.classList.contains('skip') && Math.max(height, control.type === 'checkbox' ? target.height : 0) < 24) faults.push(`${told(control)} is ${width} by ${height}, too small to touch`);
  }
  for (const element of document.querySelectorAll('[aria-describedby], [aria-labelledby]')) {
    for (const name of ['aria-describedby', 'aria-labelledby']) {
      const id = element.getAttribute(name);
      if (id && !document.getElementById(id)) faults.push(`${told(element)}: ${name} names no element`);
    }
  }
  const ids = [...document.querySelectorAll('[id]')].map((element) => element.id);
  if (new Set(ids).size !== ids.length) faults.push('an id stands twice');
  if (!document.documentElement.lang) faults.push('no language');
  const wide = document.documentElement.scrollWidth - innerWidth;
  if (wide > 0) faults.push(`the page is ${wide} pixels too wide`);
  return { faults, texts };
}
