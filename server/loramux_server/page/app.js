var k,fn,wt,ae,yt,Ye,mn,Ge,hn,kt,xt,Rr,De=Symbol.for("pv"),Ze={},Qe=[],Ir=/^m(i|n|o|s|text|space)$/,St=Array.isArray,Ct=Qe.slice,me=Object.assign;function fe(e){e&&e.parentNode&&e.remove()}function et(e,t,n){var r,a,o,s={},i=arguments.length;for(o in t)o=="key"?r=t[o]:o=="ref"&&typeof e!="function"?a=t[o]:s[o]=t[o];return i>2&&(s.children=i>3?Ct.call(arguments,2):n),Ne(e,s,r,a,null)}function Ne(e,t,n,r,a){var o={type:e,props:t,key:n,ref:r,__k:null,__:null,__b:0,__e:null,__c:null,constructor:De,__v:a||++fn,__i:-1,__u:0};return!a&&k.vnode&&k.vnode(o),o}function he(e){return e.children}function we(e,t){this.props=e,this.context=t,this.__g=0}function se(e,t){if(t==null)return e.__&&se(e.__,e.__i+1);for(var n;t<e.__k.length;t++)if((n=e.__k[t])&&n.__e)return n.__e;return typeof e.type!="function"||e.props.__P?null:se(e)}function jr(e){var t,n=e.__v,r=n.__e,a=[],o=[],s=e.__P;s&&((t=me({constructor:De},n)).__v=n.__v+1,k.vnode&&k.vnode(t),Et(s,t,n,e.__n,s.namespaceURI,32&n.__u?[r]:null,a,r||se(n),32&n.__u,o),t.__v=n.__v,t.__.__k[t.__i]=t,yn(a,t,o),n.__=n.__e=null,t.__e!=r&&vn(t))}function vn(e){if((e=e.__)&&e.__c&&!e.props.__P)return e.__e=null,e.__k.some(function(t){return t&&(e.__e=t.__e)}),vn(e)}function un(e){(8&e.__g||(e.__g|=8,ae.push(e),Ye++))&&yt==k.debounceRendering||((yt=k.debounceRendering)||queueMicrotask)(_n)}function _n(){try{for(var e,t=1;ae.length;)ae.length>t&&ae.sort(mn),e=ae.shift(),t=ae.length,8&e.__g&&jr(e)}finally{(Ye=ae.length)&&(yt||queueMicrotask)(_n)}}function gn(e,t,n,r,a,o,s,i,d,p,l){var m,f,u,v,x,b,g=r.__k||Qe,$=t.length;for(d=Lr(n,t,g,d,$),m=0;m<$;m++)(u=n.__k[m])!=null&&(f=~u.__i&&g[u.__i]||Ze,u.__i=m,b=Et(e,u,f,a,o,s,i,d,p,l),v=u.__e,(f.ref!=u.ref||8&f.__u)&&(f.ref&&Tt(f.ref,null,u,f),u.ref&&l.push(u.ref,u.__c||v,u)),x=x||v,4&u.__u?(d=$n(u,d,e,!f.__v),f.__e&&(f.__e=null)):typeof u.type=="function"&&b!==void 0?d=b:v&&(d=v.nextSibling),u.__u&=-21);return n.__e=x,d}function Lr(e,t,n,r,a){var o,s,i,d,p,l,m,f,u,v=n.length,x=v,b=0,g=0,$=e.__k=Array(a);for(o=0;o<a;o++)(s=t[o])!=null&&typeof s!="boolean"&&typeof s!="function"?(typeof s!="object"||s.constructor===String?s=$[o]=Ne(null,s):St(s)?s=$[o]=Ne(he,{children:s}):s.constructor===De&&s.__b?s=$[o]=Ne(s.type,s.props,s.key,s.ref,s.__v):$[o]=s,d=o+b,s.__=e,s.__b=e.__b+1,i=null,~(p=s.__i=zr(s,n,d,x))&&(x--,(i=n[p])&&(i.__u|=2)),i&&i.__v?(s.__u|=16,p==d-1?b--:p==d+1?b++:p!=d&&(p>d?b--:b++,g=1)):(~p||(a>v?b--:a<v&&b++),typeof s.type!="function"&&(s.__u|=4))):$[o]=null;if(g){for(l=[],m=[],o=0;o<a;o++)if((s=$[o])&&16&s.__u){for(b=0,f=l.length;b<f;)l[u=b+f>>1]<s.__i?b=u+1:f=u;l[b]=s.__i,m[o]=b+1}for(b=l.length;o--;)m[o]&&(m[o]==b?b--:$[o].__u|=4)}if(x)for(o=0;o<v;o++)!(i=n[o])||2&i.__u||(i.__e==r&&(r=se(i)),At(i,i));return r}function $n(e,t,n,r){var a,o,s,i;if(typeof e.type=="function"){if(e.props.__P)return t;if(a=e.__k)for(o=0;o<a.length;o++)a[o]&&(a[o].__=e,t=$n(a[o],t,n,!1));return t}for(t&&!t.parentNode&&(t=se(e))&&!t.parentNode&&(t=null),s=e.__e,i=t;i&&i.nodeType==8;)i=i.nextSibling;for(s!=i&&(!r&&n.moveBefore&&s.parentNode?n.moveBefore(s,t):n.insertBefore(s,t||null)),t=s;(t=t&&t.nextSibling)&&t.nodeType==8&&!t.data.startsWith("$s"););return t}function zr(e,t,n,r){var a,o=e.key,s=e.type,i=t[n],d=i&&!(2&i.__u);if(i===null&&o==null||d&&o==i.key&&s==i.type)return n;if(r>(d?1:0)){for(a=n-1;a>=0;a--)if((i=t[a])&&!(2&i.__u)&&o==i.key&&s==i.type)return a;for(a=n+1;a<t.length;a++)if((i=t[a])&&!(2&i.__u)&&o==i.key&&s==i.type)return a}return-1}function pn(e,t,n){n==null&&(n=""),t[0]=="-"?e.setProperty(t,n):e[t]=n}function Ve(e,t,n,r,a){var o,s;if(t=="style")if(typeof n=="string")e.style.cssText=n;else{if(typeof r=="string"&&(e.style.cssText=r=""),r)for(t in r)n&&t in n||pn(e.style,t);if(n)for(t in n)r&&n[t]==r[t]||pn(e.style,t,n[t])}else if(t[0]=="o"&&t[1]=="n")typeof n!="function"&&(n=null),typeof r!="function"&&(r=null),(e.__e||(e.__e={}))[t]=n,n&&r||(s=xt[t]||(xt[t]=Fr(t)),(e.__a||(e.__a={}))[t]=kt,o=t!=(t=t.replace(hn,"$1")),(t=t.slice(2))[0]<"a"&&(t=t.toLowerCase()),n?e.addEventListener(t,s,o):e.removeEventListener(t,s,o));else{if(a=="http://www.w3.org/2000/svg")t=t.replace(/xlink(H|:h)/,"h").replace(/sName$/,"s");else if(t!="width"&&t!="height"&&t!="href"&&t!="list"&&t!="form"&&t!="tabIndex"&&t!="download"&&t!="rowSpan"&&t!="colSpan"&&t!="role"&&t!="popover"&&t in e)try{return void(e[t]=n??"")}catch{}if(typeof n=="function")return;n==null||n===!1&&t[4]!="-"?e.removeAttribute(t):e.setAttribute(t,t=="popover"&&n==1?"":n)}}function Fr(e){return function(t){var n=this.__e;if(n){if(n=n[e],t[Ge]==null)t[Ge]=kt++;else if(t[Ge]<this.__a[e])return;return n(k.event?k.event(t):t)}}}function Et(e,t,n,r,a,o,s,i,d,p){var l,m,f,u,v,x,b,g,$,h,y,w,j,xe,ue,dn,oe,pe,Q=t.type;if(t.constructor!==De)return null;128&n.__u&&(d=32&n.__u,l=n.__c.__z)&&(t.__u|=d,m=o=[],l.nodeType==8?i=Xe(l,o):o.push(l),i=o[0]||i),(l=k.__b)&&l(t);e:if(typeof Q=="function"){f=s.length;try{if(g=t.props,$=(l=Q.prototype)&&l.render,h=(l=Q.contextType)&&r[l.__c],y=l?h?h.props.value:l.__:r,(u=n.__c)?(t.__c=u,2&u.__g&&(u.__g|=1)):($?t.__c=u=new Q(g,y):(t.__c=u=new we(g,y),u.constructor=Q,u.render=Ur),h&&h.sub(u),u.state||(u.state={}),u.__n=r,u.__g|=8,u.__h=[],u.__k=[]),$&&(u.__s||(u.__s=u.state),Q.getDerivedStateFromProps&&(u.__s==u.state&&(u.__s=me({},u.__s)),me(u.__s,Q.getDerivedStateFromProps(g,u.__s)))),v=u.props,x=u.state,u.__v=t,n.__c){if(g!==v&&$&&!Q.getDerivedStateFromProps&&u.componentWillReceiveProps&&u.componentWillReceiveProps(g,y),t.__v==n.__v&&!(8&u.__g)||!(4&u.__g)&&u.shouldComponentUpdate&&u.shouldComponentUpdate(g,u.__s,y)===!1){t.__v!=n.__v&&(u.props=g,u.state=u.__s,u.__g&=-9),t.__e=n.__e,t.__k=n.__k,t.__k.some(function(U){U&&(U.__=t)}),Qe.push.apply(u.__h,u.__k),u.__k=[],u.__h.length&&s.push(u),i=se(n);break e}u.componentWillUpdate&&u.componentWillUpdate(g,u.__s,y),$&&u.componentDidUpdate&&u.__h.push(function(){u.componentDidUpdate(v,x,b)})}else $&&!Q.getDerivedStateFromProps&&u.componentWillMount&&u.componentWillMount(),$&&u.componentDidMount&&u.__h.push(u.componentDidMount);u.context=y,u.props=g,u.__P=e,u.__g&=-5,w=k.__r,j=$?25:0;do u.__g&=-9,w&&w(t),l=u.render(u.props,u.state=u.__s,u.context);while(8&u.__g&&++j<25);$&&(Qe.push.apply(u.__h,u.__k),u.__k=[]),u.state=u.__s,u.getChildContext&&(r=me({},r,u.getChildContext())),$&&n.__c&&u.getSnapshotBeforeUpdate&&(b=u.getSnapshotBeforeUpdate(v,x)),xe=l&&l.type===he&&l.key==null?l.props.children:l,g.__P&&(l=i,a=(e=g.__P).namespaceURI,d=o=null,n.props&&n.props.__P!=e&&(n.__k.some(function(U){U&&At(U,U)}),n.__k=null),i=n.__k?se(n,0):null),i=gn(e,St(xe)?xe:[xe],t,n,r,a,o,s,i,d,p),g.__P&&(t.__e=null,i=l),t.__u&=-161,m&&m.some(fe),u.__h.length&&s.push(u),1&u.__g&&(u.__g&=-4)}catch(U){if(s.length=f,t.__v=null,d||o)if(U&&U.then){if(t.__u|=128|d,o){for(~(oe=o.indexOf(i||void 0))||(oe=o.length);(pe=o[oe-1])&&pe.nodeType==8;)oe--;for(;oe<o.length;oe++)if(pe=o[oe])if(o[oe]=null,ue){if(pe==dn)break}else{if(pe.nodeType!=8)break;pe.data.startsWith("$s")&&(dn=Xe(ue=pe))}}if(!ue){for(;i&&i.nodeType==8&&i.nextSibling;)i=i.nextSibling;ue=i}(l=Xe(ue=t.__c.__z||(t.__c.__z=ue)))?(t.__e=ue,i=l):t.__e=i,i=i&&i.nextSibling}else o&&o.some(fe);else t.__e=n.__e;t.__k||(t.__k=n.__k||[]),U&&U.then||bn(t),k.__e(U,t,n)}}else i=t.__e=qr(n.__e,t,n,r,a,o,s,d,p,e);return(l=k.diffed)&&l(t),i}function Xe(e,t){if(e&&e.nodeType==8&&e.data.startsWith("$s"))for(var n=1;e=e.nextSibling;){if(e.nodeType==8){if(e.data.startsWith("$s"))n++;else if(e.data.startsWith("/$s")&&!--n)return e}t&&t.push(e)}}function bn(e){e&&(e.__c&&(e.__c.__g|=4),e.__k&&e.__k.some(bn))}function yn(e,t,n){for(var r=0;r<n.length;)Tt(n[r++],n[r++],n[r++]);k.__c&&k.__c(t,e),e.some(function(a){try{e=a.__h,a.__h=[],e.some(function(o){o.call(a)})}catch(o){k.__e(o,a.__v)}})}function qr(e,t,n,r,a,o,s,i,d,p){var l,m,f,u,v,x,b,g,$=n.props||Ze,h=t.props,y=t.type;if(y=="svg"?a="http://www.w3.org/2000/svg":y=="math"?a="http://www.w3.org/1998/Math/MathML":a||(a="http://www.w3.org/1999/xhtml"),o){for(l=0;l<o.length;l++)if((v=o[l])&&(y?v.localName==y:v.nodeType==3)){e=v,o[l]=null;break}}if(!e){if(g=p.ownerDocument||document,!y)return g.createTextNode(h);e=g.createElementNS(a,y,h.is?h:p),i&&(k.__m&&k.__m(t,o),i=!1),o=null}if(y){if(p=y=="template"&&e.content||e,o=y=="textarea"&&h.defaultValue!=null?null:o&&Ct.call(p.childNodes),!i&&o)for($={},l=0;l<e.attributes.length;l++)$[(v=e.attributes[l]).name]=v.value;for(l in $)v=$[l],l=="dangerouslySetInnerHTML"?f=v:l=="children"||l in h||l=="value"&&"defaultValue"in h||l=="checked"&&"defaultChecked"in h||Ve(e,l,null,v,a);for(l in h)v=h[l],l=="children"?u=v:l=="dangerouslySetInnerHTML"?m=v:l=="value"?x=v:l=="checked"?b=v:i&&typeof v!="function"||$[l]===v||Ve(e,l,v,$[l],a);m?(i||f&&(m.__html==f.__html||m.__html==e.innerHTML)||(e.innerHTML=m.__html),t.__k=[]):(f&&(e.textContent=""),(y=="foreignObject"||a=="http://www.w3.org/1998/Math/MathML"&&Ir.test(y))&&(a="http://www.w3.org/1999/xhtml"),gn(p,St(u)?u:[u],t,n,r,a,o,s,o?o[0]:n.__k&&se(n,0),i,d),o&&o.some(fe)),i&&y!="textarea"||(l="value",y=="progress"&&x==null?e.removeAttribute(l):x==null||x===e[l]&&(y!="progress"||x)||Ve(e,l,x,$[l],a),l="checked",b!=null&&b!=e[l]&&Ve(e,l,b,$[l],a))}else $===h||i&&e.data==h||(e.data=h);return e}function Tt(e,t,n,r){try{typeof e=="function"?t?t.__x=e(t)||1:r&&(r=r.__c||r.__e)&&(t=r.__x)&&(r.__x=null,typeof t=="function"?t():e(null)):e.current=t}catch(a){k.__e(a,n)}}function At(e,t,n){var r,a,o,s;if(k.unmount&&k.unmount(e),!(r=e.ref)||r.current&&r.current!=e.__e||Tt(r,null,t,e),r=e.__c){if(r.componentWillUnmount)try{r.componentWillUnmount()}catch(i){k.__e(i,t)}r.__P=r.__n=null}if(r=e.__k)for(s=0;s<r.length;s++)r[s]&&At(r[s],t,typeof e.type!="function"||n&&!e.props.__P);!n&&(r=e.__c)&&(r=r.__z)&&(a=Xe(r,o=[]))&&(r==e.__e&&o.some(fe),fe(a),fe(r)),n||fe(e.__e),e.__e=e.__c=e.__=null}function Ur(e,t,n){return this.constructor(e,n)}function xn(e,t){var n,r,a,o;k.__&&k.__(e,t),t.nodeType==9&&(t=t.documentElement),r=(n=e&&32&e.__u)?null:t.__k,t.__k=Ne(he,{children:[e]}),a=[],o=[],Et(t,t.__k,r||Ze,Ze,t.namespaceURI,r?null:t.firstChild?Ct.call(t.childNodes):null,a,r?r.__e:t.firstChild,n,o),yn(a,t.__k,o),t.__k.props.children=null}k={__e:function(e,t,n,r){for(var a,o,s;t=t.__;)if((a=t.__c)&&!(1&a.__g)){a.__g|=4;try{if((s=(o=a.constructor)&&o.getDerivedStateFromError)&&a.setState(o.getDerivedStateFromError(e)),a.componentDidCatch&&(a.componentDidCatch(e,r||{}),s=1),s&&8&a.__g)return void(a.__g|=2)}catch(i){e=i}}throw Ye=0,e}},fn=0,wt=function(e){return e!=null&&e.constructor===De},we.prototype.setState=function(e,t){var n=this.__s;n&&n!=this.state||(n=this.__s=me({},this.state)),typeof e=="function"&&(e=e(me({},n),this.props)),e&&(me(n,e),this.__v&&(t&&this.__k.push(t),un(this)))},we.prototype.forceUpdate=function(e){this.__v&&(this.__g|=4,e&&this.__h.push(e),un(this))},we.prototype.render=he,ae=[],Ye=0,mn=function(e,t){return e.__v.__b-t.__v.__b},Ge=Symbol(),hn=/(PointerCapture)$|Capture$/i,kt=0,xt={},Rr=0;var ke,O,Mt,wn,Ot=Object.is,tt=0,Pn=[],Pt=[],M=k,kn=M.__b,Sn=M.__r,Cn=M.diffed,En=M.__c,Tn=M.unmount,An=M.__;function nt(e,t){M.__h&&M.__h(O,e,tt||t),tt=0;var n=O.__H||(O.__H={__:[],__h:[]});return e>=n.__.length&&n.__.push({}),n.__[e]}function _(e){return tt=1,Wr(Dn,e)}function Wr(e,t,n){var r=nt(ke++,2);if(r.t=e,!r.__c&&(r.__=[n?n(t):Dn(void 0,t),function(o){var s=(r.__N||r.__)[0],i=r.t(s,o);Ot(s,i)||(r.__N=[i,r.__[1]],r.__c.setState({}))}],r.__c=O,!O.__f)){O.__f=!0;var a=O.shouldComponentUpdate;O.shouldComponentUpdate=function(o,s,i){var d=this.__H;if(!d)return!0;var p=!1,l=this.props!=o;if(d.__.some(function(f){f.__N&&(p=!0,Ot(f.__[0],f.__N[0])||(l=!0))}),a){var m=a.call(this,o,s,i);return p?m||l:m}return!p||l}}return r.__}function A(e,t){var n=nt(ke++,3);!M.__s&&Nn(n.__H,t)&&(n.__P=!0,n.__=e,n.u=t,O.__H.__h.push(n))}function z(e){return tt=5,rt(function(){return{current:e}},[])}function rt(e,t){var n=nt(ke++,7);return Nn(n.__H,t)&&(n.__=e(),n.__H=t),n.__}function Dt(){var e=nt(ke++,11);if(!e.__){for(var t=O.__v;!t.__m&&t.__;)t=t.__;var n=t.__m||(t.__m=[0,0]);e.__="P"+n[0]+"-"+n[1]++}return e.__}function Br(){var e;do{for(;e=Pt.shift();)try{Re(e)}catch(n){M.__e(n,{__:(e=e.__P)&&e.__v})}for(;e=Pn.shift();){var t=e.__H;if(e.__P&&t)try{t.__h.some(Re),t.__h.some(Nt),t.__h=[]}catch(n){t.__h=[],M.__e(n,e.__v)}}}while(Pt.length)}M.__b=function(e){O=null,kn&&kn(e)},M.__=function(e,t){e&&t.__k&&t.__k.__m&&(e.__m=t.__k.__m),An&&An(e,t)},M.__r=function(e){Sn&&Sn(e),ke=0;var t=(O=e.__c).__H;t&&(Mt==O?O.__h=[]:(t.__h.some(Re),t.__h.some(Nt),ke=0),t.__h=[],t.__.some(function(n){n.__N&&(n.__=n.__N),n.u=n.__N=void 0})),Mt=O},M.diffed=function(e){Cn&&Cn(e);var t=e.__c;t&&t.__H&&(t.__H.__h.length&&On(Pn.push(t)),t.__H.__.some(function(n){n.u&&(n.__H=n.u)})),Mt=O=null},M.__c=function(e,t){t.some(function(n){try{n.__h.some(Re),n.__h=n.__h.filter(function(r){return!r.__||Nt(r)})}catch(r){n.__h=[function(){throw r}]}}),En&&En(e,t)},M.unmount=function(e){Tn&&Tn(e);var t,n,r=e.__c;r&&r.__H&&(r.__H.__.some(function(a){try{if(a.__P&&a.__c){if(n===void 0){for(n=e.__;n&&(!n.__c||!n.__c.__P);)n=n.__;n=n&&n.__c}a.__P=n,On(Pt.push(a))}else Re(a)}catch(o){t=o}}),r.__H=void 0,t&&M.__e(t,r.__v))};var Mn=typeof requestAnimationFrame=="function";function Hr(e){var t,n=function(){clearTimeout(r),Mn&&cancelAnimationFrame(t),setTimeout(e)},r=setTimeout(n,35);Mn&&(t=requestAnimationFrame(n))}function On(e){e!=1&&wn==M.requestAnimationFrame||((wn=M.requestAnimationFrame)||Hr)(Br)}function Re(e){var t=O,n=e.__c;typeof n=="function"&&(e.__c=void 0,n()),O=t}function Nt(e){var t=O;e.__c=e.__(),O=t}function Nn(e,t){return!e||e.length!=t.length||t.some(function(n,r){return!Ot(n,e[r])})}function Dn(e,t){return typeof t=="function"?t(e):t}var Jr=Symbol.for("preact-signals");function it(){if(ee>1)ee--;else{var e,t=!1;for((function(){var a=at;for(at=void 0;a!==void 0;){var o=a.S;if(o.v===a.v)for(var s=o.t;s!==void 0;s=s.x)s.i===a.i&&(s.i=o.i);a=a.o}})();je!==void 0;){var n=je;for(je=void 0,ot++;n!==void 0;){var r=n.u;if(n.u=void 0,n.f&=-3,!(8&n.f)&&In(n))try{n.c()}catch(a){t||(e=a,t=!0)}n=r}}if(ot=0,ee--,t)throw e}}function It(e){if(ee>0)return e();Rt=++Kr,ee++;try{return e()}finally{it()}}var Ie,E=void 0;function Le(e){var t=E,n=Ie;E=void 0,Ie=void 0;try{return e()}finally{E=t,Ie=n}}var je=void 0,ee=0,ot=0,Kr=0,Rt=0,at=void 0,st=0;function Rn(e){if(E!==void 0){var t=e.n;if(t===void 0||t.t!==E)return t={i:0,S:e,p:E.s,n:void 0,t:E,e:void 0,x:void 0,r:t},E.s!==void 0&&(E.s.n=t),E.s=t,e.n=t,32&E.f&&e.S(t),t;if(t.i===-1)return t.i=0,t.n!==void 0&&(t.n.p=t.p,t.p!==void 0&&(t.p.n=t.n),t.p=E.s,t.n=void 0,E.s.n=t,E.s=t),t}}function P(e,t){this.v=e,this.i=0,this.n=void 0,this.t=void 0,this.l=0,this.W=t?.watched,this.Z=t?.unwatched,this.name=t?.name}P.prototype.brand=Jr;P.prototype.h=function(){return!0};P.prototype.S=function(e){var t=this,n=this.t;n!==e&&e.e===void 0&&(e.x=n,this.t=e,n!==void 0?n.e=e:Le(function(){var r;(r=t.W)==null||r.call(t)}))};P.prototype.U=function(e){var t=this;if(this.t!==void 0){var n=e.e,r=e.x;n!==void 0&&(n.x=r,e.e=void 0),r!==void 0&&(r.e=n,e.x=void 0),e===this.t&&(this.t=r,r===void 0&&Le(function(){var a;(a=t.Z)==null||a.call(t)}))}};P.prototype.subscribe=function(e){var t=this;return G(function(){var n=t.value;Le(function(){return e(n)})},{name:"sub"})};P.prototype.valueOf=function(){return this.value};P.prototype.toString=function(){return this.value+""};P.prototype.toJSON=function(){return this.value};P.prototype.peek=function(){var e=this;return Le(function(){return e.value})};Object.defineProperty(P.prototype,"value",{get:function(){var e=Rn(this);return e!==void 0&&(e.i=this.i),this.v},set:function(e){if(e!==this.v){if(ot>100)throw new Error("Cycle detected");(function(n){ee!==0&&ot===0&&n.l!==Rt&&(n.l=Rt,at={S:n,v:n.v,i:n.i,o:at})})(this),this.v=e,this.i++,st++,ee++;try{for(var t=this.t;t!==void 0;t=t.x)t.t.N()}finally{it()}}}});function T(e,t){return new P(e,t)}function In(e){for(var t=e.s;t!==void 0;t=t.n)if(t.S.i!==t.i||!t.S.h()||t.S.i!==t.i)return!0;return!1}function jn(e){for(var t=e.s;t!==void 0;t=t.n){var n=t.S.n;if(n!==void 0&&(t.r=n),t.S.n=t,t.i=-1,t.n===void 0){e.s=t;break}}}function Ln(e){for(var t=e.s,n=void 0;t!==void 0;){var r=t.p;t.i===-1?(t.S.U(t),r!==void 0&&(r.n=t.n),t.n!==void 0&&(t.n.p=r)):n=t,t.S.n=t.r,t.r!==void 0&&(t.r=void 0),t=r}e.s=n}function ve(e,t){P.call(this,void 0,t),this.x=e,this.s=void 0,this.g=st-1,this.f=4}ve.prototype=new P;ve.prototype.h=function(){if(this.f&=-3,1&this.f)return!1;if((36&this.f)==32||(this.f&=-5,this.g===st))return!0;if(this.g=st,this.f|=1,this.i>0&&!In(this))return this.f&=-2,!0;var e=E;try{jn(this),E=this;var t=this.x();(16&this.f||this.v!==t||this.i===0)&&(this.v=t,this.f&=-17,this.i++)}catch(n){this.v=n,this.f|=16,this.i++}return E=e,Ln(this),this.f&=-2,!0};ve.prototype.S=function(e){if(this.t===void 0){this.f|=36;for(var t=this.s;t!==void 0;t=t.n)t.S.S(t)}P.prototype.S.call(this,e)};ve.prototype.U=function(e){if(this.t!==void 0&&(P.prototype.U.call(this,e),this.t===void 0)){this.f&=-33;for(var t=this.s;t!==void 0;t=t.n)t.S.U(t)}};ve.prototype.N=function(){if(!(2&this.f)){this.f|=6;for(var e=this.t;e!==void 0;e=e.x)e.t.N()}};Object.defineProperty(ve.prototype,"value",{get:function(){if(1&this.f)throw new Error("Cycle detected");var e=Rn(this);if(this.h(),e!==void 0&&(e.i=this.i),16&this.f)throw this.v;return this.v}});function _e(e,t){return new ve(e,t)}function zn(e){var t=e.j;if(e.j=void 0,typeof t=="function"){ee++;var n=E;E=void 0;try{t()}catch(r){throw e.f&=-2,e.f|=8,jt(e),r}finally{E=n,it()}}}function jt(e){for(var t=e.s;t!==void 0;t=t.n)t.S.U(t);e.x=void 0,e.s=void 0,zn(e)}function Vr(e){if(E!==this)throw new Error("Out-of-order effect");Ln(this),E=e,this.f&=-2;try{8&this.f&&jt(this)}finally{it()}}function Se(e,t){this.x=e,this.j=void 0,this.s=void 0,this.u=void 0,this.f=32,this.name=t?.name,Ie&&Ie.push(this)}Se.prototype.c=function(){var e=this.S();try{if(8&this.f||this.x===void 0)return;var t=this.x();typeof t=="function"&&(this.j=t)}finally{e()}};Se.prototype.S=function(){if(1&this.f)throw new Error("Cycle detected");this.f|=1,this.f&=-9,zn(this),jn(this),ee++;var e=E;return E=this,Vr.bind(this,e)};Se.prototype.N=function(){2&this.f||(this.f|=2,this.u=je,je=this)};Se.prototype.d=function(){this.f|=8,1&this.f||jt(this)};Se.prototype.dispose=function(){this.d()};function G(e,t){var n=new Se(e,t);try{n.c()}catch(a){throw n.d(),a}var r=n.d.bind(n);return r[Symbol.dispose]=r,r}var Fn,ct,lt,Gr=typeof window<"u"&&!!window.__PREACT_SIGNALS_DEVTOOLS__;var qn=[];G(function(){Fn=this.N})();function Ce(e,t){k[e]=t.bind(null,k[e]||function(){})}function ze(e){if(lt){var t=lt;lt=void 0,t()}lt=e&&e.S()}function Un(e){var t=this,n=e.data,r=Yr(n);r.name="ReactiveDom",r.value=n;var a=rt(function(){for(var i=t,d=t.__v;d=d.__;)if(d.__c){d.__c.__$f|=4;break}var p=_e(function(){var u=r.value.value;return u===0?0:u===!0?"":u||""}),l=_e(function(){return!Array.isArray(p.value)&&!wt(p.value)}),m=G(function(){if(this.N=Wn,l.value){var u=p.value;i.__v&&i.__v.__e&&i.__v.__e.nodeType===3&&(i.__v.__e.data=u)}}),f=t.__$u.d;return t.__$u.d=function(){m(),f.call(this)},[l,p]},[]),o=a[0],s=a[1];return o.value?s.peek():s.value}Un.displayName="ReactiveTextNode";Object.defineProperties(P.prototype,{constructor:{configurable:!0,value:et(he,null).constructor},type:{configurable:!0,value:Un},props:{configurable:!0,get:function(){var e=this;return{data:{get value(){return e.value}}}}},__b:{configurable:!0,value:1}});Ce("__b",function(e,t){if(ze(),ct=void 0,typeof t.type=="string"){var n,r=t.props;for(var a in r)if(a!=="children"){var o=r[a];o instanceof P&&(n||(t.__np=n={}),n[a]=o,r[a]=o.peek())}}e(t)});Ce("__r",function(e,t){if(e(t),t.type!==he){ze();var n,r=t.__c;r&&(r.__$f&=-2,(n=r.__$u)===void 0&&(r.__$u=n=(function(a,o){var s;return G(function(){s=this},{name:o}),s.c=a,s})((function(a){return function(){var o;Gr&&((o=this.y)==null||o.call(this)),a.__$f|=1,a.setState({})}})(r),typeof t.type=="function"?t.type.displayName||t.type.name:""))),ct=r,ze(n)}});Ce("__e",function(e,t,n,r){ze(),ct=void 0,e(t,n,r)});Ce("diffed",function(e,t){ze(),ct=void 0;var n;if(typeof t.type=="string"&&(n=t.__e)){var r=t.__np,a=t.props,o=n.U;if(o)for(var s in o){var i=o[s];i===void 0||r&&s in r||(i.d(),o[s]=void 0)}if(r){o||(o={},n.U=o);for(var d in r){var p=o[d],l=r[d];p===void 0?(p=Xr(n,d,l,a),o[d]=p):p.o(l,a)}}}e(t)});function Xr(e,t,n,r){var a=t in e&&e.ownerSVGElement===void 0,o=T(n);return{o:function(s,i){o.value=s,r=i},d:G(function(){this.N=Wn;var s=o.value.value;r[t]!==s&&(r[t]=s,a?e[t]=s:s!=null&&(s!==!1||t[4]==="-")?e.setAttribute(t,s):e.removeAttribute(t))})}}Ce("unmount",function(e,t){if(typeof t.type=="string"){var n=t.__e;if(n){var r=n.U;if(r){n.U=void 0;for(var a in r){var o=r[a];o&&o.d()}}}var s=t.__np;if(s){var i=t.props;for(var d in s)i[d]=s[d]}t.__np=void 0}else{var p=t.__c;if(p){p.__$f|=8;var l=p.__$u;l&&(p.__$u=void 0,l.d())}}e(t)});Ce("__h",function(e,t,n,r){r<3&&(t.__$f|=2),e(t,n,r)});we.prototype.shouldComponentUpdate=function(e,t){if(this.__R)return!0;var n=this.__$u,r=n&&n.s!==void 0;for(var a in t)return!0;if(this.__f||typeof this.u=="boolean"&&this.u===!0){var o=2&this.__$f;if(!(r||o||4&this.__$f)||1&this.__$f)return!0}else if(!(r||4&this.__$f)||3&this.__$f)return!0;for(var s in e)if(s!=="__source"&&e[s]!==this.props[s])return!0;for(var i in this.props)if(!(i in e))return!0;return!1};function Yr(e,t){return rt(function(){return T(e,t)},[])}var Zr=function(e){queueMicrotask(function(){queueMicrotask(e)})};function Qr(){It(function(){for(var e;e=qn.shift();)Fn.call(e)})}function Wn(){qn.push(this)===1&&(k.requestAnimationFrame||Zr)(Qr)}var Hn=function(e,t,n,r){var a;t[0]=0;for(var o=1;o<t.length;o++){var s=t[o++],i=t[o]?(t[0]|=s?1:2,n[t[o++]]):t[++o];s===3?r[0]=i:s===4?r[1]=Object.assign(r[1]||{},i):s===5?(r[1]=r[1]||{})[t[++o]]=i:s===6?r[1][t[++o]]+=i+"":s?(a=e.apply(i,Hn(e,i,n,["",null])),r.push(a),i[0]?t[0]|=2:(t[o-2]=0,t[o]=a)):r.push(i)}return r},Bn=new Map;function Jn(e){var t=Bn.get(this);return t||(t=new Map,Bn.set(this,t)),(t=Hn(this,t.get(e)||(t.set(e,t=(function(n){for(var r,a,o=1,s="",i="",d=[0],p=function(f){o===1&&(f||(s=s.replace(/^\s*\n\s*|\s*\n\s*$/g,"")))?d.push(0,f,s):o===3&&(f||s)?(d.push(3,f,s),o=2):o===2&&s==="..."&&f?d.push(4,f,0):o===2&&s&&!f?d.push(5,0,!0,s):o>=5&&((s||!f&&o===5)&&(d.push(o,0,s,a),o=6),f&&(d.push(o,f,0,a),o=6)),s=""},l=0;l<n.length;l++){l&&(o===1&&p(),p(l));for(var m=0;m<n[l].length;m++)r=n[l][m],o===1?r==="<"?(p(),d=[d],o=3):s+=r:o===4?s==="--"&&r===">"?(o=1,s=""):s=r+s[0]:i?r===i?i="":s+=r:r==='"'||r==="'"?i=r:r===">"?(p(),o=1):o&&(r==="="?(o=5,a=s,s=""):r==="/"&&(o<5||n[l][m+1]===">")?(p(),o===3&&(d=d[0]),o=d,(d=d[0]).push(2,0,o),o=0):r===" "||r==="	"||r===`
`||r==="\r"?(p(),o=2):s+=r),o===3&&s==="!--"&&(o=4,d=d[0])}return p(),d})(e)),t),arguments,[])).length>1?t:t[0]}var c=Jn.bind(et);async function*Kn(e){let t=e.body.pipeThrough(new TextDecoderStream).getReader(),n="";try{for(;;){let{done:r,value:a}=await t.read();if(r)return;n+=a;let o=n.split(`

`);n=o.pop();for(let s of o){let i=s.split(`
`).filter(d=>d.startsWith("data:")).map(d=>d.slice(5).trim());if(i.length){if(i[0]==="[DONE]")return;yield JSON.parse(i.join(`
`))}}}}finally{t.cancel().catch(()=>{})}}var Lt="loramux.key",L=T(sessionStorage.getItem(Lt)??""),ie=T(""),ge=T(!0),Fe=T(0),X=class extends Error{constructor(t,{status:n=0,code:r="",param:a="",faults:o=[]}={}){super(t),Object.assign(this,{status:n,code:r,param:a,faults:o})}};function qe(e){L.value=e,ie.value="",e?sessionStorage.setItem(Lt,e):sessionStorage.removeItem(Lt)}function Vn(e={}){return L.value?{...e,Authorization:`Bearer ${L.value}`}:e}async function Y(e,t,{body:n,signal:r,headers:a}={}){let o;try{o=await fetch(t,{method:e,signal:r,headers:Vn(n===void 0?a:{"Content-Type":"application/json",...a}),body:n===void 0?void 0:JSON.stringify(n)})}catch(s){throw s.name==="AbortError"?s:(zt(),new X("The server cannot be reached.",{code:"unreachable"}))}if(!o.ok)throw Xn(o.status,await o.text());return o}var R=async(e,t)=>(await Y("GET",e,t)).json(),W=async(e,t={},n)=>(await Y("POST",e,{...n,body:t})).json(),Gn=async(e,t)=>(await Y("PATCH",e,{body:t})).json(),dt=async e=>(await Y("DELETE",e)).json();async function*Ee(e,t,n){let r=await Y(e,t,n);try{for await(let a of Kn(r)){if(a.error?.message&&a.object===void 0)throw new X(a.error.message,a.error);yield a}}catch(a){throw a instanceof X||a.name==="AbortError"?a:(zt(),new X("The connection broke before the answer was complete.",{code:"unreachable"}))}}function ut(e,t,{onProgress:n=()=>{},signal:r}={}){return new Promise((a,o)=>{let s=new XMLHttpRequest;s.open("POST",e);for(let[i,d]of Object.entries(Vn()))s.setRequestHeader(i,d);s.upload.onprogress=i=>i.lengthComputable&&n(i.loaded/i.total),s.upload.onload=()=>n(1),s.onload=()=>{s.status<300?a(JSON.parse(s.responseText)):o(Xn(s.status,s.responseText))},s.onerror=()=>{zt(),o(new X("The upload broke off: the server cannot be reached.",{code:"unreachable"}))},s.onabort=()=>o(new DOMException("stopped","AbortError")),r?.addEventListener("abort",()=>s.abort()),s.send(t)})}async function Te(e,t){let n=document.createElement("a");n.download=t,L.value?n.href=URL.createObjectURL(await(await Y("GET",e)).blob()):n.href=e,n.click(),L.value&&setTimeout(()=>URL.revokeObjectURL(n.href),6e4)}function Xn(e,t){let n={};try{n=JSON.parse(t).error??{}}catch{}let r=n.message??`The server answered with status ${e}.`;return e===401&&(qe(""),ie.value=r),new X(r,{...n,status:e})}async function zt(){if(ge.value){ge.value=!1;for(let e=500;!ge.value;e=Math.min(5e3,e*1.5)){await new Promise(t=>setTimeout(t,e));try{await fetch("/health",{cache:"no-store"}),ge.value=!0,Fe.value+=1}catch{}}}}function B(e,t,n=[]){let r=z(e);r.current=e;let a=z(()=>{});return A(()=>{let o,s=!0,i=!1,d=async()=>{clearTimeout(o),!i&&(i=!0,document.hidden||await r.current(()=>s).catch(()=>{}),i=!1,s&&(o=setTimeout(d,t*1e3)))};return a.current=d,d(),document.addEventListener("visibilitychange",d),()=>{s=!1,clearTimeout(o),document.removeEventListener("visibilitychange",d)}},[t,Fe.value,...n]),()=>a.current()}var Ft="loramux.theme";function Yn(){let[e,t=""]=location.hash.replace(/^#\/?/,"").split("?"),[n,...r]=e.split("/");return{view:n||"compare",rest:r.map(decodeURIComponent).join("/"),query:new URLSearchParams(t)}}var J=T(Yn());addEventListener("hashchange",()=>J.value=Yn());var $e=T(localStorage.getItem(Ft)??"");G(()=>{$e.value?document.documentElement.dataset.theme=$e.value:delete document.documentElement.dataset.theme});var Zn=matchMedia("(prefers-color-scheme: dark)"),qt=T(Zn.matches);Zn.addEventListener("change",e=>qt.value=e.matches);var Ue=_e(()=>$e.value?$e.value==="dark":qt.value);function Qn(){let e=Ue.value?"light":"dark";$e.value=e===(qt.value?"dark":"light")?"":e,$e.value?localStorage.setItem(Ft,$e.value):localStorage.removeItem(Ft)}var H=T(null),F=_e(()=>H.value?.find(e=>!e.parent)??null);async function Ae(){let e=(await R("/v1/models")).data;JSON.stringify(e)!==JSON.stringify(H.value)&&(H.value=e)}function pt(e){let t=String.fromCharCode(...new TextEncoder().encode(JSON.stringify(e)));return btoa(t).replaceAll("+","-").replaceAll("/","_").replace(/=+$/,"")}function Ut(e){try{let t=atob(e.replaceAll("-","+").replaceAll("_","/"));return JSON.parse(new TextDecoder().decode(Uint8Array.from(t,n=>n.charCodeAt(0))))}catch{return null}}var er="loramux.compare",ft=4,Ht={temperature:.7,top_p:1,max_tokens:128,seed:42},tr={mode:"chat",system:"",prompt:"",sampling:Ht},K=T({...tr}),N=T([]),eo=0;function Wt(e){return{id:++eo,model:T(e),turns:T([]),status:T("idle"),error:T(null),figures:T(null),abort:null}}function We(e){if(e.mode&&e.mode!==K.value.mode)for(let t of N.value)le(t),t.turns.value=[],t.figures.value=null;K.value={...K.value,...e},Be()}function nr(e,t){e.model.value=t,Be()}function rr(e){N.value.length<ft&&(N.value=[...N.value,Wt(e)]),Be()}function or(e){le(e),N.value=N.value.filter(t=>t!==e),Be()}var ar=()=>({...K.value,models:N.value.map(e=>e.model.value)});function sr(e,t){let n=e.get("s"),r=n?Ut(n):N.value.length?null:Ut(sessionStorage.getItem(er)??"");if(r&&Array.isArray(r.models)&&(K.value={mode:r.mode==="text"?"text":"chat",system:String(r.system??""),prompt:String(r.prompt??""),sampling:{...Ht,...to(r.sampling)}},N.value.forEach(le),N.value=r.models.slice(0,ft).map(a=>Wt(String(a))),Be(),n&&history.replaceState(null,"","#/compare")),!N.value.length){let a=t.filter(s=>s.parent&&!s.id.includes(":")),o=t.find(s=>!s.parent);N.value=[o,...a.slice(0,1)].filter(Boolean).map(s=>Wt(s.id))}}var to=e=>Object.fromEntries(Object.entries(e??{}).filter(([t,n])=>t in Ht&&(n===null||typeof n=="number"))),Be=()=>sessionStorage.setItem(er,pt(ar())),ir=()=>`${location.origin}/#/compare?s=${pt(ar())}`,Me=(e,t="")=>`#/compare?s=${pt({...tr,prompt:t,models:e})}`;function Jt(e,t){let{mode:n,system:r,sampling:a}=K.value,o=Object.fromEntries(Object.entries(a).filter(([,i])=>i!==null));if(n==="text")return["/v1/completions",{model:e.model.value,prompt:t[0]?.content??"",...o}];let s=[...r.trim()?[{role:"system",content:r}]:[],...t];return["/v1/chat/completions",{model:e.model.value,messages:s,...o}]}function Kt(){for(let e of N.value)le(e),e.turns.value=[],e.figures.value=null,Vt(e,K.value.prompt)}function le(e){e.abort?.abort()}async function Vt(e,t){le(e);let n=e.abort=new AbortController,r=K.value.mode==="text",a=e.turns.value,o=r?[{role:"text",content:(a[0]?.content??"")+t}]:[...a,{role:"user",content:t}],[s,i]=Jt(e,o);e.error.value=null,e.status.value="waiting",e.turns.value=r?o:[...o,{role:"assistant",content:""}];let d=new Bt(e),p=no(e,o,r);try{let l={body:{...i,stream:!0,stream_options:{include_usage:!0,continuous_usage_stats:!0}},signal:n.signal};for await(let m of Ee("POST",s,l)){let f=m.choices[0],u=r?f?.text:f?.delta.content;d.saw(m.usage,!!u,f?.finish_reason),u&&p(u)}e.status.value="done"}catch(l){if(n!==e.abort)return;e.status.value=l.name==="AbortError"?"stopped":"error",l.name!=="AbortError"&&(e.error.value=l instanceof X?l:new X(String(l.message)))}finally{p("",!0),n===e.abort&&(e.abort=null)}}function no(e,t,n){let r="",a=0,o=()=>{a=0,e.turns.value=n?[{role:"text",content:t[0].content+r,from:t[0].content.length}]:[...t,{role:"assistant",content:r}]};return(s,i=!1)=>{r+=s,i?(cancelAnimationFrame(a),(r||!n)&&o()):a||=requestAnimationFrame(o)}}var Bt=class{constructor(t){this.column=t,this.began=performance.now(),this.first=null,this.figures={ttft:null,tokens:0,rate:null,finish:null}}saw(t,n,r){let a=performance.now();n&&this.first===null&&(this.first=a,this.column.status.value="streaming",this.figures.ttft=(a-this.began)/1e3),t&&(this.figures.tokens=t.completion_tokens),r&&(this.figures.finish=r);let o=(a-(this.first??a))/1e3;this.figures.tokens>1&&o>.05&&(this.figures.rate=(this.figures.tokens-1)/o),this.column.figures.value={...this.figures}}};var lr=["B","kB","MB","GB","TB"];function D(e){if(e==null)return"–";let t=0;for(;e>=1e3&&t<lr.length-1;)e/=1e3,t+=1;return`${e.toFixed(t&&e<100?1:0)} ${lr[t]}`}function C(e,t=3){return e==null||!Number.isFinite(e)?"–":e!==0&&Math.abs(e)<.001?e.toExponential(1):e.toLocaleString("en",{maximumSignificantDigits:Math.abs(e)>=1e3?12:t})}function Z(e){return e==null||!Number.isFinite(e)?"–":e<1?`${Math.round(e*1e3)} ms`:e<60?`${e.toFixed(e<10?1:0)} s`:(e=Math.round(e),e<3600?`${Math.floor(e/60)} min ${e%60} s`:`${Math.floor(e/3600)} h ${Math.floor(e%3600/60)} min`)}function te(e,t=Date.now()/1e3){if(e==null)return"–";let n=Math.max(0,t-e);return n<5?"now":n<60?`${Math.floor(n)} s ago`:n<3600?`${Math.floor(n/60)} min ago`:n<86400?`${Math.floor(n/3600)} h ago`:new Date(e*1e3).toLocaleDateString()}var Oe=e=>new Date(e*1e3).toLocaleTimeString([],{hour12:!1}),be=(e,t)=>`${e.toLocaleString("en")} ${t}${e===1?"":"s"}`;function S({error:e,title:t}){if(!e)return null;let[n,...r]=ro(e);return c`<div class="problem" role="alert">
${t&&c`<strong>${t}</strong>`}
<p>${n}</p>
${r.length>0&&c`<ul>
${r.map(a=>c`<li>${a}</li>`)}
</ul>`}
</div>`}function ro({message:e,faults:t}){return t?.length?[e.split(": ")[0],...t.map(({where:n,problem:r})=>`${n}: ${r}`)]:e.split(/(?:;|\.) (?=Line \d+,|and \d+ more lines)/)}function mt({title:e,children:t}){return c`<div class="empty"><h3>${e}</h3>${t}</div>`}function q({label:e,hint:t,children:n,wide:r}){return c`<label class=${r?"field wide":"field"}>
<span class="label">${e}</span>${n}${t&&c`<span class="hint">${t}</span>`}
</label>`}function ye({label:e,checked:t,onChange:n,hint:r}){return c`<label class="check" title=${r}>
<input type="checkbox" checked=${t} onChange=${a=>n(a.target.checked)} /> ${e}
</label>`}function ce({value:e,label:t}){return c`<progress max="1" value=${e??void 0} aria-label=${t}></progress>`}function ht({value:e,onChange:t,label:n}){let r=H.value??[],a=r.some(o=>o.id===e);return c`<select aria-label=${n} value=${e} onChange=${o=>t(o.target.value)}>
${!a&&e&&c`<option value=${e}>${e} (not here)</option>`}
${r.map(o=>c`<option value=${o.id}>${o.id}${o.parent?"":" (base)"}</option>`)}
</select>`}function vt({text:e,label:t,title:n}){let[r,a]=_("");return c`<button class="quiet" type="button" title=${n} onClick=${async()=>{try{await navigator.clipboard.writeText(e()),a("Copied")}catch{a("The browser did not allow it")}setTimeout(()=>a(""),1600)}}>
<span aria-live="polite">${r||t}</span>
</button>`}function oo({title:e,onClose:t,children:n}){let r=z(),a=Dt();return A(()=>{r.current.showModal()},[]),c`<dialog ref=${r} aria-labelledby=${a} onClose=${t}>
<h2 id=${a}>${e}</h2>
${n}
</dialog>`}function _t({title:e,verb:t,act:n,onClose:r,children:a}){let[o,s]=_(null),[i,d]=_(!1);return c`<${oo} title=${e} onClose=${r}>
${a}
<${S} error=${o} />
<div class="row end">
<button type="button" onClick=${r}>Cancel</button>
<button type="button" class="danger" disabled=${i} onClick=${async()=>{d(!0);try{await n(),r()}catch(l){s(l),d(!1)}}}>${t}</button>
</div>
<//>`}function gt({label:e,accept:t,multiple:n=!1,onFiles:r,children:a}){let[o,s]=_(!1),i=Dt();return c`<div
class=${o?"drop over":"drop"}
onDragOver=${l=>(l.preventDefault(),s(!0))}
onDragLeave=${()=>s(!1)}
onDrop=${l=>{l.preventDefault(),s(!1),l.dataTransfer.files.length&&r([...l.dataTransfer.files])}}
>
<strong>${e}</strong>
<input
id=${i}
class="hidden"
type="file"
accept=${t}
multiple=${n}
onChange=${l=>{l.target.files.length&&r([...l.target.files]),l.target.value=""}}
/>
<label class="button" for=${i}>${n?"Choose files":"Choose a file"}<span class="hidden">: ${e}</span></label>
${a}
</div>`}var V=({kind:e="",children:t})=>c`<span class=${`chip ${e}`}>${t}</span>`;var ao={ok:"It changes the base's answers, and does exactly what PEFT does with the same weights.",noop:"It changes nothing.",disagrees:"It is served otherwise than PEFT computes it.",not_finite:"It produces numbers that are not finite.",skipped:"It was uploaded without verification."};function cr({adapter:e}){let[t,n]=_(null),[r,a]=_(null);A(()=>{let i=!0;return R(He(e.id)).then(d=>i&&n(d),d=>i&&a(d)),()=>i=!1},[e.id,e.generation]);let o=t?.verification,s=o?.report;return c`<div class="block">
<h3>Verification</h3>
<${S} error=${r} />
${t&&!o&&c`<p class="muted">Nobody asked for one: adapters from folders and checkpoints are not verified.</p>`}
${o&&c`<p>${ao[o.verdict]} ${s&&c`<span class="muted">Checked at ${Oe(o.checked_at)}.</span>`}</p>`}
${s&&c`<${so} report=${s} />`}
${t&&c`<dl class="facts">
<dt>Source</dt><dd>${t.source}${t.origin&&` (${t.origin})`}</dd>
<dt>Base in its config</dt><dd>${t.base_model??"not named"}</dd>
<dt>Stored as</dt><dd>${t.dtype??"–"}</dd>
${t.description&&c`<dt>Description</dt><dd>${t.description}</dd>`}
</dl>`}
</div>`}function so({report:e}){let{shift:t,peft:n}=e,r=io(e.weights.modules),a=Math.max(...r.map(([,o])=>o),1e-12);return c`<div class="block">
<dl class="facts">
${t&&c`<dt>Other next token than the base</dt><dd>${C(t.top1_changed*100)} % of ${t.positions} positions</dd>
<dt>KL from the base</dt><dd>${C(t.kl)} nats</dd>`}
${n&&c`<dt>Same next token as PEFT</dt><dd>${C(n.top1_agreement*100)} %</dd>
<dt>Error against PEFT</dt><dd>${C(n.relative_error)} of at most ${C(n.relative_bound)}</dd>`}
</dl>
${e.warnings.map(o=>c`<p class="note">${o}</p>`)}
<h4>Size of the update, by layer <span class="muted">‖ΔW‖ / ‖W‖</span></h4>
<ul class="bars">
${r.map(([o,s])=>c`<li>
<span>${o}</span><span class="track"><span style=${{width:`${100*s/a}%`}}></span></span><span class="n">${C(s)}</span>
</li>`)}
</ul>
</div>`}function io(e){let t=new Map;for(let{name:n,delta_norm:r,weight_norm:a}of e){let o=/\.(\d+)\./.exec(n)?.[1]??n,[s,i]=t.get(o)??[0,0];t.set(o,[s+r**2,i+a**2])}return[...t].map(([n,[r,a]])=>[n,Math.sqrt(r/(a||1))]).sort((n,r)=>n[0]-r[0])}var Gt="adapter_config.json",Xt="adapter_model.safetensors",Yt=/\.(zip|tar|tar\.gz|tgz|tar\.zst)$/i,dr={overwrite:!1,pinned:!1,verify:!0};function ur({onDone:e}){let[t,n]=_([]),[r,a]=_(""),[o,s]=_(dr),[i,d]=_(null),[p,l]=_(null),[m,f]=_(""),u=z(null),v=h=>{l(null),f("");let y=[...h,...t.filter(j=>!h.some(xe=>xe.name===j.name))];n(y);let w=y.find(j=>Yt.test(j.name));w&&!r&&a(w.name.replace(Yt,"").replace(/[^A-Za-z0-9._-]+/g,"-"))},[x,b]=lo(t),g=()=>{n([]),a(""),s(dr),l(null)};return c`<form class="panel upload" onSubmit=${async h=>{h.preventDefault(),l(null),d(0),u.current=new AbortController;let y=new FormData;for(let[w,j]of Object.entries({name:r,...o}))y.append(w,String(j));for(let[w,j]of x)y.append(w,j);try{let w=await ut("/v1/adapters",y,{onProgress:d,signal:u.current.signal});g(),f([`${w.id} is ready to be called.`,...w.warnings??[]].join(" ")),e()}catch(w){w.name!=="AbortError"&&l(w)}finally{d(null)}}}>
<${gt} label="Drop an adapter here" multiple accept=".json,.safetensors,.zip,.tar,.gz,.tgz,.zst" onFiles=${v}>
<p class="muted">${Gt} and ${Xt}, or one archive of them (.zip, .tar, .tar.gz, .tar.zst).</p>
<//>
${t.length>0&&c`<ul class="files">${t.map(h=>c`<li>${h.name} <span class="muted">${D(h.size)}</span></li>`)}</ul>
${b&&c`<p class="note">${b}</p>`}
<div class="row wrap bottom">
<${q} label="Name"><input
type="text"
required
value=${r}
placeholder="support-bot"
onInput=${h=>a(h.target.value)}
/><//>
<${ye}
label="Replace if the name is taken"
checked=${o.overwrite}
onChange=${h=>s({...o,overwrite:h})}
/>
<${ye}
label="Pin to the device"
checked=${o.pinned}
onChange=${h=>s({...o,pinned:h})}
/>
<${ye}
label="Verify against PEFT"
checked=${o.verify}
onChange=${h=>s({...o,verify:h})}
/>
<span class="grow"></span>
<button type="button" onClick=${()=>i===null?g():u.current.abort()}>Cancel</button>
<button class="primary" disabled=${i!==null||b||!r}>Upload</button>
</div>`}
${i!==null&&c`<div class="progress" role="status">
<${ce} label="Upload" value=${i<1?i:void 0} />
${i<1?`Sending, ${Math.round(i*100)} %`:o.verify?"Checking the files and verifying against PEFT…":"Checking the files…"}
</div>`}
<${S} error=${p} title="The adapter was not taken" />
<p class="said" role="status">${m}</p>
</form>`}function lo(e){let t=e.filter(o=>Yt.test(o.name));if(t.length)return[[["archive",t[0]]],e.length>1?"An archive comes alone: cancel and drop it again.":""];let n=e.find(o=>o.name.endsWith(".json")),r=e.find(o=>o.name.endsWith(".safetensors")),a=n&&r?"":`${n?Xt:Gt} is missing: drop it, too.`;return[[[Gt,n],[Xt,r]].filter(([,o])=>o),a]}var pr={bf16:"bf16",fp16:"fp16",fp32:"fp32",nf4:"NF4 (4 bit)"},co={succeeded:"good",failed:"bad",running:"busy"};function fr({adapter:e}){let t=`${He(e.id)}/exports`,[n,r]=_(null),[a,o]=_("bf16"),[s,i]=_("dequantized"),[d,p]=_(8),[l,m]=_(null),f=B(async v=>{let x=(await R(`${t}?limit=20`)).data;v()&&r(x)},3,[t]);return c`<div class="block">
<h3>Export</h3>
<p class="muted">The base and this adapter merged into one checkpoint, proven to answer as it is served here.</p>
<form class="row wrap bottom" onSubmit=${async v=>{v.preventDefault(),m(null);try{await W(t,{format:a,onto:s,verify:d}),f()}catch(x){m(x)}}}>
<label class="field"><span class="label">Format</span>
<select value=${a} onChange=${v=>o(v.target.value)}>
${Object.entries(pr).map(([v,x])=>c`<option value=${v}>${x}</option>`)}
</select>
</label>
<label class="field"><span class="label">Merged onto</span>
<select value=${s} onChange=${v=>i(v.target.value)}>
<option value="dequantized">the weights as served</option>
<option value="original">the original weights</option>
</select>
</label>
<label class="field"><span class="label">Prompts to prove it on</span>
<input
type="number"
min="0"
max="8"
required
value=${d}
onInput=${v=>p(v.target.valueAsNumber)}
/>
</label>
<button>Start export</button>
</form>
<${S} error=${l} />
${n?.map(v=>c`<${uo} key=${v.id} job=${v} path=${`${t}/${v.id}`} onChanged=${f} />`)}
</div>`}function uo({job:e,path:t,onChanged:n}){let[r,a]=_(null),[o,s]=_(null),i=["queued","running"].includes(e.status);A(()=>{if(!i)return;let l=new AbortController;return po(t,l.signal,a).then(n,()=>{}),()=>l.abort()},[t,i]);let d=l=>async()=>{try{await l(),n()}catch(m){s(m)}},p=r??e.progress;return c`<div class="job" data-export=${e.id}>
<div class="row spread">
<span><${V} kind=${co[e.status]}>${e.status}<//> ${pr[e.format]}, ${te(e.created)}${e.bytes?`, ${D(e.bytes)}`:""}</span>
<span class="row">
${e.status==="succeeded"&&c`<button
type="button"
onClick=${d(()=>Te(`${t}/download`,`${e.adapter.replaceAll("/","-")}-${e.format}.tar`))}
>Download</button>`}
${i&&c`<button type="button" onClick=${d(()=>W(`${t}/cancel`))}>Cancel</button>`}
${!i&&c`<button type="button" class="quiet" onClick=${d(()=>dt(t))}>Remove</button>`}
</span>
</div>
${i&&c`<div class="progress" role="status">
<${ce} label="Export" value=${p.fraction} />
${p.phase}, ${C(p.fraction*100)} %${p.eta_seconds?`, about ${Z(p.eta_seconds)} left`:""}
</div>`}
<${S} error=${e.error??o} />
</div>`}async function po(e,t,n){for await(let r of Ee("GET",`${e}/events?stream=true`,{signal:t}))r.object==="adapter.export.progress"&&n(r)}var He=e=>`/v1/adapters/${e.split("/").map(encodeURIComponent).join("/")}`,fo=["Name","State","Generation","Rank","Targets","Size","Tier","Requests","Last used"],mo=new Set(["Rank","Size","Requests"]),ho=200,Zt=null;async function vo(){let e=[];for(let t="";;){let n=await R(`/v1/adapters?limit=${ho}${t&&`&after=${encodeURIComponent(t)}`}`);if(e.push(...n.data),!n.has_more)return e;t=n.last_id}}function mr(){let[e,t]=_(Zt),[n,r]=_(null),[a,o]=_(""),s=J.value.rest,i=B(async l=>{try{Zt=await vo(),l()&&(t(Zt),r(null))}catch(m){l()&&r(m)}},2),d=()=>{i(),Ae().catch(()=>{})},p=e?.filter(l=>l.id.toLowerCase().includes(a.toLowerCase()));return c`<section>
<h1 class="hidden">Adapters</h1>
<${ur} onDone=${d} />
<${S} error=${e?null:n} />
${!e&&!n&&c`<p class="muted">Asking the server…</p>`}
${e?.length===0&&c`<${mt} title="No adapters yet"
>Upload one above, or train one under <a href="#/train">Train</a>. The base answers without any.<//
>`}
${e?.length>8&&c`<input
class="filter"
type="search"
aria-label="Filter by name"
placeholder="Filter by name"
value=${a}
onInput=${l=>o(l.target.value)}
/>`}
${p?.length>0&&c`<div class="panel scroll" tabindex="0" role="region" aria-label="Table of adapters">
<table class="adapters">
<thead>
<tr>
${fo.map(l=>c`<th scope="col" class=${mo.has(l)?"n":""}>${l}</th>`)}
<th scope="col"><span class="hidden">Actions</span></th>
</tr>
</thead>
<tbody>
${p.map(l=>c`<${go}
key=${l.id}
adapter=${l}
isOpen=${s===l.id}
onChanged=${d}
/>`)}
</tbody>
</table>
</div>`}
${p?.length===0&&e.length>0&&c`<p class="muted">No adapter's name has “${a}” in it.</p>`}
</section>`}var _o={ready:"good",failed:"bad",loading:"busy",available:""};function go({adapter:e,isOpen:t,onChanged:n}){let{id:r}=e,a=e.target_modules?.map(o=>o.replace(/_proj$/,"")).join(" ")??"–";return c`<tr class=${t?"open":""} data-adapter=${r}>
<th scope="row">
<a href=${t?"#/adapters":`#/adapters/${encodeURIComponent(r)}`} aria-expanded=${t}>${r}</a>
${e.pinned&&c`<${V}>pinned<//>`}
${e.verification?.verdict&&!["ok","skipped"].includes(e.verification.verdict)&&c`<${V} kind="bad">${e.verification.verdict}<//>`}
</th>
<td><${V} kind=${_o[e.state]}>${e.state}<//></td>
<td><code title=${e.generation}>${e.generation.slice(0,8)}</code></td>
<td class="n" data-label="rank">${e.rank??"–"}</td>
<td class="targets" title=${e.target_modules?.join(", ")}>${a}</td>
<td class="n">${D(e.bytes)}</td>
<td>${e.tier}</td>
<td class="n" data-label="requests" title="running now / since the server started">${e.in_flight?`${e.in_flight} / `:""}${e.requests}</td>
<td>${e.last_used?te(e.last_used):"not yet"}</td>
<td class="actions"><div class="row end">
<a class="button" href=${Me([F.value?.id,r].filter(Boolean))}>Compare</a>
<a
class="button"
href=${t?"#/adapters":`#/adapters/${encodeURIComponent(r)}`}
aria-label=${`${t?"Close":"Manage"} ${r}`}
>${t?"Close":"Manage"}</a>
</div></td>
</tr>
${t&&c`<tr class="detail">
<td colspan="10"><${$o} adapter=${e} onChanged=${n} /></td>
</tr>`}`}function $o({adapter:e,onChanged:t}){let[n,r]=_(null),[a,o]=_(""),s=He(e.id),i=e.generations.filter(f=>f.generation!==e.generation),[d,p]=_(""),l=async f=>{r(null);try{await f(),t()}catch(u){r(u)}},m=async()=>{await dt(s),location.hash="#/adapters",t()};return c`<div class="manage">
<${S} error=${e.failure&&{message:e.failure}} />
<${S} error=${n} />
<div class="row wrap">
<button
type="button"
onClick=${()=>l(()=>Gn(s,{pinned:!e.pinned}))}
>${e.pinned?"Unpin":"Pin to the device"}</button>
<button
type="button"
onClick=${()=>l(()=>Te(`${s}/download`,`${e.id.replaceAll("/","-")}.tar.gz`))}
>Download</button>
${i.length>0&&c`<span class="row group">
<select
aria-label="Generation to roll back to"
value=${d||i[0].generation}
onChange=${f=>p(f.target.value)}
>
${i.map(f=>c`<option value=${f.generation}>${f.generation.slice(0,8)}, ${te(f.created)}, ${f.source}</option>`)}
</select>
<button
type="button"
onClick=${()=>l(()=>W(`${s}/rollback`,{generation:d||i[0].generation}))}
>Roll back</button>
</span>`}
<span class="grow"></span>
<button type="button" class="danger" onClick=${()=>o("delete")}>Delete…</button>
</div>
<div class="split">
<${cr} adapter=${e} />
<${fr} adapter=${e} />
</div>
${a==="delete"&&c`<${_t} title=${`Delete ${e.id}?`} verb="Delete" act=${m} onClose=${()=>o("")}>
<p>New requests for this name will be refused at once; those that run finish. Its files go when nothing needs them any more.</p>
<//>`}
</div>`}function hr(e,t){let n=t.match(/\S+|\s+/g)??[],r=n.filter(i=>i.trim()),a=bo(e.match(/\S+/g)??[],r),o=[],s=0;for(let i of n){let d=o.at(-1),p=i.trim()?!a[s++]:!!(d?.differs&&s<a.length&&!a[s]);d&&d.differs===p?d.text+=i:o.push({text:i,differs:p})}return o}function bo(e,t){let n=new Array(t.length).fill(!1),r=0;for(;r<e.length&&r<t.length&&e[r]===t[r];)n[r++]=!0;let a=e.slice(r),o=t.slice(r);if(!a.length||!o.length||a.length>1500||o.length>1500)return n;let s=o.length+1,i=new Uint16Array((a.length+1)*s);for(let d=a.length-1;d>=0;d--)for(let p=o.length-1;p>=0;p--)i[d*s+p]=a[d]===o[p]?i[(d+1)*s+p+1]+1:Math.max(i[(d+1)*s+p],i[d*s+p+1]);for(let d=0,p=0;d<a.length&&p<o.length;)a[d]===o[p]?(n[r+p]=!0,d++,p++):i[(d+1)*s+p]>=i[d*s+p+1]?d++:p++;return n}var yo=e=>`'${e.replaceAll("'","'\\''")}'`;function vr(e,t,n,r){let a=[`curl ${e}${t}`,"-H 'Content-Type: application/json'"];return r&&a.push('-H "Authorization: Bearer $LORAMUX_API_KEY"'),a.push(`-d ${yo(JSON.stringify(n,null,2))}`),a.join(` \\
  `)}function _r(e,t,n,r){let a=t.endsWith("/chat/completions")?"chat.completions":"completions",o=Object.entries(n).map(([d,p])=>`    ${d}=${Qt(p,"    ")},`),s=r?'os.environ["LORAMUX_API_KEY"]':'"none"',i=a==="completions"?"answer.choices[0].text":"answer.choices[0].message.content";return[...r?["import os",""]:[],"from openai import OpenAI","",`client = OpenAI(base_url=${JSON.stringify(`${e}/v1`)}, api_key=${s})`,`answer = client.${a}.create(`,...o,")",`print(${i})`,""].join(`
`)}function Qt(e,t){return e===null?"None":typeof e=="boolean"?e?"True":"False":Array.isArray(e)?`[
${e.map(n=>`${t}    ${Qt(n,`${t}    `)},
`).join("")}${t}]`:typeof e=="object"?`{${Object.entries(e).map(([n,r])=>`${JSON.stringify(n)}: ${Qt(r,t)}`).join(", ")}}`:JSON.stringify(e)}var Pe=e=>["waiting","streaming"].includes(e.status.value);function gr(){let e=J.value.query;A(()=>sr(e,H.value),[e]);let t=N.value;return c`<section class="compare">
<h1 class="hidden">Compare</h1>
<${xo} />
<div class="columns" data-count=${t.length}>
${t.map((n,r)=>c`<${ko}
key=${n.id}
column=${n}
first=${r?t[0]:null}
/>`)}
</div>
</section>`}function xo(){let{mode:e,system:t,prompt:n,sampling:r}=K.value,a=N.value,o=z(),s=a.some(Pe),i=n.trim()&&a.length,d=l=>{l.key==="Enter"&&(l.ctrlKey||l.metaKey)&&i&&(l.preventDefault(),Kt())},p=(l,m,f)=>c`<${q} label=${l.replace("_"," ")}>
<input
type="number"
step=${m}
...${f}
value=${r[l]??""}
onInput=${u=>We({sampling:{...r,[l]:u.target.value===""?null:u.target.valueAsNumber}})}
/>
<//>`;return c`<form
class="panel ask"
onKeyDown=${d}
onSubmit=${l=>(l.preventDefault(),i&&Kt())}
>
<div class="row spread wrap">
<div class="segments" role="group" aria-label="Kind of prompt">
${["chat","text"].map(l=>c`<button type="button" aria-pressed=${e===l} onClick=${()=>We({mode:l})}>
${l==="chat"?"Chat":"Completion"}
</button>`)}
</div>
<div class="row">
<${vt} text=${ir} label="Copy link" title="An address that opens this comparison" />
<button
type="button"
disabled=${a.length>=ft}
onClick=${()=>rr(wo())}
>Add column</button>
</div>
</div>
${e==="chat"&&c`<${q} label="System message" wide>
<textarea
rows="1"
value=${t}
placeholder="Optional"
onInput=${l=>We({system:l.target.value})}
></textarea>
<//>`}
<${q} label=${e==="chat"?"Message":"Text to continue"} wide>
<textarea
ref=${o}
rows="3"
value=${n}
placeholder=${e==="chat"?"Ask all columns the same":"Once upon a time"}
onInput=${l=>We({prompt:l.target.value})}
></textarea>
<//>
<div class="row spread bottom">
<div class="row fields">
${p("temperature",.1,{min:0,max:2})} ${p("top_p",.05,{min:0,max:1})}
${p("max_tokens",1,{min:1})} ${p("seed",1,{})}
</div>
${s?c`<button key="stop" type="button" onClick=${()=>a.forEach(le)}>Stop all</button>`:c`<button key="send" class="primary" disabled=${!i}>Send <kbd>Ctrl ↵</kbd></button>`}
</div>
</form>`}function wo(){let e=new Set(N.value.map(t=>t.model.value));return(H.value.find(t=>!e.has(t.id))??H.value[0]).id}function ko({column:e,first:t}){let n=e.turns.value,r=e.model.value,[a,o]=Jt(e,So(n));return c`<article class="panel column" aria-label=${r}>
<header>
<${ht} label="Model of this column" value=${r} onChange=${s=>nr(e,s)} />
<button
type="button"
class="quiet icon"
aria-label=${`Remove column ${r}`}
onClick=${()=>or(e)}
>✕</button>
</header>
<div
class="turns"
role="log"
aria-live="polite"
aria-busy=${Pe(e)}
tabindex="0"
aria-label=${`Answers of ${r}`}
>
${!n.length&&c`<p class="muted">${r}'s answer will appear here.</p>`}
${n.map((s,i)=>c`<${Co}
turn=${s}
other=${t?.turns.value[i]}
column=${e}
first=${t}
/>`)}
<${S} error=${e.error.value} />
</div>
<${To} column=${e} />
<${Ao} column=${e} />
<footer class="row">
<${vt} label="Copy as curl" text=${()=>vr(location.origin,a,o,!!L.value)} />
<${vt} label="Copy as Python" text=${()=>_r(location.origin,a,o,!!L.value)} />
</footer>
</article>`}var So=e=>e.at(-1)?.role==="assistant"?e.slice(0,-1):e.length?e:[{role:"user",content:K.value.prompt}];function Co({turn:e,other:t,column:n,first:r}){let a=e.role!=="user",s=a&&r&&t?.role===e.role&&!Pe(n)&&!Pe(r)?hr(t.content,e.content):[{text:e.content,differs:!1}];return c`<div class=${`turn ${e.role}`}>
<span class="hidden">${e.role}: </span>
<span class="text">${s.map(({text:i,differs:d})=>d?c`<mark>${i}</mark>`:i)}</span>
${a&&Pe(n)&&c`<span class="caret" aria-hidden="true"></span>`}
</div>`}var Eo={length:"cut at max tokens",stop:"finished"};function To({column:e}){let t=e.figures.value,n=e.status.value,r={idle:"Ready",waiting:"Waiting",streaming:"Streaming",stopped:"Stopped",error:"Failed",done:Eo[t?.finish]??"finished"};return c`<div class="row spread wrap measured">
<dl class="figures">
<div><dt>TTFT</dt><dd data-figure="ttft">${Z(t?.ttft)}</dd></div>
<div><dt>tokens/s</dt><dd data-figure="rate">${C(t?.rate)}</dd></div>
<div><dt>tokens</dt><dd data-figure="tokens">${t?.tokens||"–"}</dd></div>
</dl>
<${V} kind=${n}>${r[n]}<//>
</div>`}function Ao({column:e}){let[t,n]=_(""),r=K.value.mode==="text",a=o=>{o.preventDefault(),!(!r&&!t.trim())&&(Vt(e,t),n(""))};return Pe(e)?c`<button type="button" class="full" onClick=${()=>le(e)}>Stop</button>`:e.turns.value.length?c`<form class="row continue" onSubmit=${a}>
<input
type="text"
value=${t}
aria-label=${`Continue with ${e.model.value}`}
placeholder=${r?"Add text, or just continue":"Continue this column"}
onInput=${o=>n(o.target.value)}
/>
<button>${r?"Continue":"Send"}</button>
</form>`:null}function $r(){let[e,t]=_("");return c`<form class="panel login" onSubmit=${r=>{r.preventDefault(),qe(e.trim()),Ae().catch(()=>{})}}>
<h1>This server asks for a key</h1>
<p role="alert">${ie.value}</p>
<${q} label="API key" wide>
<input
type="password"
autocomplete="current-password"
required
autofocus
value=${e}
onInput=${r=>t(r.target.value)}
/>
<//>
<button class="primary full">Sign in</button>
<p class="hint">It is kept in this tab until you close it.</p>
</form>`}var ne={top:8,right:12,bottom:24,left:52};function $t({label:e,xs:t,series:n,height:r=220,format:a,describe:o}){let s=z(),[i,d]=_(0),[p,l]=_(null);A(()=>{let g=new ResizeObserver(([$])=>d($.contentRect.width));return g.observe(s.current),()=>g.disconnect()},[]);let m=n.flatMap(g=>g.values.filter($=>$!=null)),f=Po(Math.min(0,...m),Math.max(...m,1e-9),r/48),u=br(t[0],t.at(-1),ne.left,i-ne.right),v=br(f[0],f.at(-1),r-ne.bottom,ne.top),x=g=>{let $=g.clientX-s.current.getBoundingClientRect().left;l(t.reduce((h,y,w)=>Math.abs(u(y)-$)<Math.abs(u(t[h])-$)?w:h,0))},b=p!==null&&p<t.length?p:null;return c`<figure class="chart">
<div ref=${s}>
${i>0&&c`<svg
width=${i}
height=${r}
role="img"
aria-label=${`${e}. ${Mo(n,a)}`}
onPointerMove=${x}
onPointerLeave=${()=>l(null)}
>
${f.map(g=>c`<g><line
class="grid"
x1=${ne.left}
x2=${i-ne.right}
y1=${v(g)}
y2=${v(g)}
/><text x=${ne.left-8} y=${v(g)+4} text-anchor="end">${a(g)}</text></g>`)}
${No(t,i).map(g=>c`<text x=${u(g)} y=${r-6} text-anchor="middle">${o(g)}</text>`)}
${b!==null&&c`<line
class="cursor"
x1=${u(t[b])}
x2=${u(t[b])}
y1=${ne.top}
y2=${r-ne.bottom}
/>`}
${n.map(({values:g,points:$},h)=>c`<g class=${`line-${h+1}`}>
<path d=${Oo(t,g,u,v)} />
${t.map((y,w)=>g[w]!=null&&($||w===b||t.length===1)&&c`<circle cx=${u(y)} cy=${v(g[w])} r="3.5" />`)}
</g>`)}
</svg>`}
</div>
<figcaption>
${b!==null&&c`<span class="muted">${o(t[b])}</span>`}
${n.map(({label:g,values:$},h)=>c`<span class=${`line-${h+1}`}><i></i>${g} <b>${a($[b??yr($)])}</b></span>`)}
</figcaption>
</figure>`}var br=(e,t,n,r)=>a=>t===e?(n+r)/2:n+(a-e)/(t-e)*(r-n),yr=e=>e.findLastIndex(t=>t!=null),Mo=(e,t)=>e.map(({label:n,values:r})=>`${n}: from ${t(r.find(a=>a!=null))} to ${t(r[yr(r)])}`).join("; ");function Oo(e,t,n,r){return e.map((o,s)=>[o,t[s]]).filter(([,o])=>o!=null).map(([o,s],i)=>`${i?"L":"M"}${n(o).toFixed(1)} ${r(s).toFixed(1)}`).join("")}function Po(e,t,n){let r=(t-e)/Math.max(1,n),a=10**Math.floor(Math.log10(r)),o=[1,2,5,10].map(i=>i*a).find(i=>i>=r),s=Math.floor(e/o);return Array.from({length:Math.ceil(t/o)-s+1},(i,d)=>(s+d)*o)}function No(e,t){let n=Math.min(e.length,Math.max(2,Math.floor(t/110)));return n<2?e.slice(0,1):Array.from({length:n},(r,a)=>e[Math.round(a*(e.length-1)/(n-1))])}async function bt(e){return Do(await(await e("GET","/metrics",{headers:{Accept:"text/plain"}})).text())}function Do(e){let t=new Map;for(let n of e.split(`
`)){let r=/^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(n);if(!r)continue;let a={};for(let[,o,s]of(r[2]??"").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g))a[o]=s.replace(/\\n/g,`
`).replace(/\\(.)/g,"$1");t.has(r[1])||t.set(r[1],[]),t.get(r[1]).push({labels:a,value:Number(r[3].replace("Inf","Infinity"))})}return t}var I=(e,t)=>(e.get(t)??[]).reduce((n,{value:r})=>n+r,0),Je=(e,t,n)=>Object.fromEntries((e.get(t)??[]).map(({labels:r,value:a})=>[r[n],a]));function en(e,t,n,r){let a=new Map((t?.get(`${n}_bucket`)??[]).map(({labels:p,value:l})=>[p.le,l])),o=(e.get(`${n}_bucket`)??[]).map(({labels:p,value:l})=>({top:p.le==="+Inf"?1/0:Number(p.le),count:l-(a.get(p.le)??0)})).sort((p,l)=>p.top-l.top),s=o.at(-1)?.count??0;if(!s)return null;let i=0,d=0;for(let{top:p,count:l}of o){if(l>=r*s)return p===1/0?i:i+(p-i)*(r*s-d)/Math.max(1,l-d);i=p,d=l}return i}function tn(e,t,n){let r=I(e,`${n}_count`)-(t?I(t,`${n}_count`):0),a=I(e,`${n}_sum`)-(t?I(t,`${n}_sum`):0);return r>0?a/r:null}function xr(){return L.value?c`<div class="panel">
<h2>Keys</h2>
<p>This tab uses the key that ends in <code>${L.value.slice(-4)}</code>; what it may not see is refused with a sentence that says so.</p>
<p class="muted">Keys are listed, made and revoked by the operator: <code>loramux keys --help</code> on the machine that serves.</p>
</div>`:null}var Ro=2,Io=150,jo=15;function wr(){let e=z([]),[t,n]=_(null),[r,a]=_(""),[o,s]=_(null);if(B(async l=>{try{let m=await bt(Y);r||a((await R("/version")).version),e.current=[...e.current,{at:performance.now()/1e3,time:Date.now()/1e3,samples:m}].slice(-Io),l()&&(n(e.current),s(null))}catch(m){l()&&s(m)}},Ro),!t)return c`<section><${S} error=${o} />${!o&&c`<p class="muted">Asking the server…</p>`}</section>`;let i=t.at(-1).samples,d=t.at(-1-Math.min(jo,t.length-1))?.samples,p=t.length>1?d:null;return c`<section>
<div class="row spread wrap">
<h1>${F.value?.id??"Server"}</h1>
<span class="muted">${F.value?.root!==F.value?.id&&`${F.value?.root}, `}${Lo(i)}, loramux ${r}</span>
</div>
<${zo} now=${i} window=${p} readings=${t} />
<${Fo} readings=${t} />
<div class="split">
<${Uo} now=${i} window=${p} />
<${Bo} now=${i} />
</div>
<${xr} />
</section>`}function Lo(e){let{quantization:t,dtype:n}=e.get("loramux_model_info")?.[0]?.labels??{};return`${t?.toUpperCase()}, computes in ${n}`}function kr(e,t,n){let r=I(e.samples,n)-I(t.samples,n);return Math.max(0,r)/(e.at-t.at)}function zo({now:e,window:t,readings:n}){let[r,a]=n.slice(-2),s=[["engine",Object.entries(Je(e,"loramux_engine_state","state")).find(([,i])=>i)?.[0]??"–"],["tokens/s",a?C(kr(a,r,"loramux_generation_tokens_total")):"–"],["running",I(e,"loramux_num_requests_running")],["waiting",I(e,"loramux_num_requests_waiting")],["tokens in a step",C(tn(e,t,"loramux_batch_size"))],["adapters in a step",C(tn(e,t,"loramux_batch_adapters"))],["KV cache in use",`${C(100*I(e,"loramux_kv_cache_usage_perc"))} %`],["adapter slots",`${I(e,"loramux_adapter_slots_used")} of ${I(e,"loramux_adapter_slots")}`],["jobs training",Je(e,"loramux_training_jobs","status").running??0],["worker restarts",I(e,"loramux_worker_restarts_total")]];return c`<dl class="panel figures tiles">${s.map(([i,d])=>c`<div><dt>${i}</dt><dd>${d}</dd></div>`)}</dl>`}function Fo({readings:e}){let t=e.slice(1);if(!t.length)return c`<div class="panel"><h2>Tokens a second</h2><p class="muted">A moment…</p></div>`;let n=a=>t.map((o,s)=>kr(o,e[s],a)),r=[{label:"generated",values:n("loramux_generation_tokens_total")},{label:"trained on",values:n("loramux_training_tokens_total")}];return c`<div class="panel">
<h2>Tokens a second</h2>
<${$t}
label="Tokens a second over the last minutes"
xs=${t.map(a=>a.time)}
series=${r}
height=${180}
format=${C}
describe=${Oe}
/>
</div>`}var qo={"Time to first token":"loramux_time_to_first_token_seconds","Between tokens":"loramux_inter_token_latency_seconds","Whole request":"loramux_e2e_request_latency_seconds","In the queue":"loramux_request_queue_time_seconds","Engine step":"loramux_step_seconds"};function Uo({now:e,window:t}){let n=(r,a)=>Z(en(e,t,r,a)??en(e,null,r,a));return c`<div class="panel"><h2>Latency</h2>
<table>
<thead><tr><th scope="col"><span class="hidden">Of</span></th>${["p50","p95","p99"].map(r=>c`<th scope="col" class="n">${r}</th>`)}</tr></thead>
<tbody>
${Object.entries(qo).map(([r,a])=>c`<tr><th scope="row">${r}</th>${[.5,.95,.99].map(o=>c`<td class="n">${n(a,o)}</td>`)}</tr>`)}
</tbody>
</table>
<p class="hint">Of the last half minute; of all time where nothing happened in it.</p>
</div>`}var Wo={weights:"Weights of the base",kv_cache:"KV cache",adapter_pool:"Adapters on the device",adapter_host:"Adapters in host memory"};function Bo({now:e}){let t=Je(e,"loramux_memory_bytes","kind"),n=Math.max(...Object.values(t),1),r=Je(e,"loramux_data_disk_bytes","state");return c`<div class="panel"><h2>Memory</h2>
<ul class="bars">
${Object.entries(Wo).map(([a,o])=>c`<li><span>${o}</span><span class="track"><span style=${{width:`${100*(t[a]??0)/n}%`}}></span></span><span class="n">${D(t[a]??0)}</span></li>`)}
</ul>
<dl class="facts">
<dt>Worker process</dt><dd>${D(I(e,"loramux_worker_resident_memory_bytes"))}</dd>
<dt>Free on the data disk</dt><dd>${D(r.free)} of ${D(r.total)}</dd>
</dl>
</div>`}var Ho=64,nn=new Map;function Sr({job:e,checkpoints:t}){let[n,r]=_(e.metadata?.sample_prompt??""),[a,o]=_(n),[,s]=_(0),[i,d]=_(null),p=[{model:e.model,label:`${e.model}, before`},...t.toSorted((m,f)=>m.step_number-f.step_number).map(m=>({model:m.fine_tuned_model_checkpoint,label:`step ${m.step_number}`,loss:m.metrics.valid_loss??m.metrics.train_loss})),...e.fine_tuned_model?[{model:e.fine_tuned_model,label:"finished"}]:[]],l=t.length||e.fine_tuned_model?p:[];return A(()=>{let m=new AbortController;return(async()=>{d(null);for(let{model:f}of n?l:[]){let u=JSON.stringify([f,n]);nn.has(u)||(nn.set(u,await Jo(f,n,m.signal)),s(v=>v+1))}})().catch(f=>f.name!=="AbortError"&&d(f)),()=>m.abort()},[n,l.map(m=>m.model).join()]),c`<div class="panel">
<h2>Samples</h2>
<form class="row" onSubmit=${m=>(m.preventDefault(),r(a.trim()))}>
<input
type="text"
class="grow"
value=${a}
aria-label="Prompt for samples"
placeholder="A prompt that the base and every checkpoint answer"
onInput=${m=>o(m.target.value)}
/>
<button>Ask all</button>
</form>
<${S} error=${i} />
${!l.length&&c`<p class="muted">Checkpoints appear here as they are made; each can be called at once.</p>`}
<ul class="samples">
${l.map(({model:m,label:f,loss:u})=>{let v=nn.get(JSON.stringify([m,n]));return c`<li key=${m} data-sample=${m}>
<div class="row spread"><strong>${f}</strong><span class="row">${u!=null&&c`<span class="muted">loss ${C(u)}</span>`}<a href=${Me([e.model,m],n)}>Compare</a></span></div>
${n&&c`<p class="text">${v??"…"}</p>`}
</li>`})}
</ul>
</div>`}async function Jo(e,t,n){return(await W("/v1/chat/completions",{model:e,messages:[{role:"user",content:t}],temperature:0,max_tokens:Ho},{signal:n})).choices[0].message.content}var rn=["succeeded","failed","cancelled"];function Cr({id:e}){let t=`/v1/fine_tuning/jobs/${encodeURIComponent(e)}`,[n,r]=_(null),[a,o]=_([]),[s,i]=_(null),[d,p]=_(!1),l=Ko(t),m=B(async x=>{try{let[b,g]=await Promise.all([R(t),R(`${t}/checkpoints?limit=100`)]);if(!x())return;r(b),o($=>JSON.stringify($)===JSON.stringify(g.data)?$:g.data)}catch(b){x()&&i(b)}},n&&rn.includes(n.status)?30:2,[t]),f=x=>async()=>{i(null);try{r(await W(`${t}/${x}`)),m()}catch(b){i(b)}};if(!n)return c`<section><${S} error=${s} />${!s&&c`<p class="muted">Asking the server…</p>`}</section>`;let{status:u}=n,v=n.fine_tuned_model;return c`<section>
<div class="row spread wrap">
<h1 class="name">${v??n.id}</h1>
<span class="row wrap">
${v&&c`<a
class="button primary"
href=${Me([n.model,v],n.metadata?.sample_prompt)}
>Try it</a>`}
${["queued","running"].includes(u)&&c`<button type="button" onClick=${f("pause")}>Pause</button>`}
${u==="paused"&&c`<button type="button" onClick=${f("resume")}>Resume</button>`}
${!rn.includes(u)&&c`<button type="button" class="danger" onClick=${()=>p(!0)}>Cancel…</button>`}
<a class="button" href="#/train">All jobs</a>
</span>
</div>
<${S} error=${n.error} title="The job ended with an error" />
<${S} error=${s} />
<${Vo} job=${n} steps=${l.steps} />
<${Go} steps=${l.steps} />
<div class="split">
<${Xo} events=${l.said} />
<${Zo} job=${n} />
</div>
<${Sr} job=${n} checkpoints=${a} />
${d&&c`<${_t}
title="Cancel this job?"
verb="Cancel the job"
act=${f("cancel")}
onClose=${()=>p(!1)}
>
<p>It cannot be resumed. Its checkpoints stay and can be called.</p>
<//>`}
</section>`}function Ko(e){let[t,n]=_({steps:new Map,said:[]});return A(()=>{let r=new AbortController,a=new Map,o=[],s=0,i=()=>{s=0,n({steps:new Map(a),said:[...o]})};return(async()=>{for await(let d of Ee("GET",`${e}/events?stream=true`,{signal:r.signal}))d.type==="metrics"?a.set(d.data.step,{...a.get(d.data.step),...d.data}):o.push(d),s||=requestAnimationFrame(i)})().catch(()=>{}),()=>{cancelAnimationFrame(s),r.abort()}},[e,Fe.value]),t}function Vo({job:e,steps:t}){let n=[...t.values()].findLast(a=>a.train_loss!==void 0),r=e.status==="running"&&e.estimated_finish?e.estimated_finish-Date.now()/1e3:null;return c`<div class="panel">
<dl class="figures">
<div><dt>status</dt><dd><${V} kind=${on[e.status]}>${an[e.status]??e.status}<//></dd></div>
<div><dt>step</dt><dd>${n?`${n.step} of ${n.total_steps}`:"–"}</dd></div>
<div><dt>loss</dt><dd>${C(n?.train_loss)}</dd></div>
<div><dt>tokens/s</dt><dd>${C(n?.tokens_per_second)}</dd></div>
<div><dt>learning rate</dt><dd>${C(n?.learning_rate,2)}</dd></div>
<div><dt>${r===null?"created":"left"}</dt><dd>${r===null?te(e.created_at):Z(Math.max(0,r))}</dd></div>
</dl>
${n&&!rn.includes(e.status)&&c`<${ce} label="Training" value=${n.step/n.total_steps} />`}
</div>`}function Go({steps:e}){let t=[...e.keys()].sort((o,s)=>o-s),n=(o,s,i)=>({label:o,points:i,values:t.map(d=>e.get(d)[s]??null)}),a=[n("training loss","train_loss"),n("validation loss","valid_loss",!0)].filter(({values:o})=>o.some(s=>s!==null));return a.length?c`<div class="panel"><h2>Loss</h2><${$t}
label="Loss by step"
xs=${t}
series=${a}
format=${C}
describe=${o=>`step ${o}`}
/></div>`:c`<div class="panel"><p class="muted">The loss appears here with the first step.</p></div>`}function Xo({events:e}){let t=e.filter(n=>n.level!=="info");return c`<div class="panel">
${t.length>0&&c`<h2>Diagnoses</h2>
${t.map(n=>c`<p
class=${n.level==="error"?"problem":"note"}
key=${n.id}
>${n.message}</p>`)}`}
<h2>Events</h2>
<div class="events" role="log" aria-live="polite" tabindex="0" aria-label="Events">
<ol>
${e.toReversed().map(n=>c`<li key=${n.id}><time>${Oe(n.created_at)}</time> ${n.message}</li>`)}
</ol>
</div>
</div>`}var Yo=["n_epochs","batch_size","learning_rate","r","lora_alpha","max_seq_length","target_modules","total_steps"];function Zo({job:e}){let t=e.hyperparameters,n=r=>Array.isArray(r)?r.join(" "):typeof r=="number"?C(r):String(r);return c`<div class="panel">
<h2>Recipe</h2>
<dl class="facts">
<dt>trained on</dt><dd>${e.model}</dd>
${Yo.filter(r=>t[r]!==void 0).map(r=>c`<dt>${r}</dt><dd>${n(t[r])}</dd>`)}
<dt>seed</dt><dd>${e.seed}</dd>
${e.trained_tokens!==null&&c`<dt>trained</dt><dd>${be(e.trained_tokens,"token")}</dd>`}
</dl>
${e.result_files.map(r=>c`<${Qo} id=${r} />`)}
</div>`}function Qo({id:e}){let[t,n]=_(null);return A(()=>{R(`/v1/files/${e}`).then(n,()=>{})},[e]),t?c`<button
type="button"
class="quiet"
onClick=${()=>Te(`/v1/files/${e}/content`,t.filename)}
>${t.filename} <span class="muted">${D(t.bytes)}</span></button>`:null}var Er="loramux.recipe",sn={model:"",file:null,validation:null,suffix:"",prompt:"",fields:{}},de=T(ea());function ea(){try{return{...sn,...JSON.parse(sessionStorage.getItem(Er)??"{}")}}catch{return{...sn}}}function re(e){de.value={...de.value,...e},sessionStorage.setItem(Er,JSON.stringify(de.value))}var Ke=(e,t)=>re({fields:{...de.value.fields,[e]:t}}),Tr=()=>re(sn),Ar={n_epochs:{label:"Epochs",step:1,min:1},batch_size:{label:"Batch size",step:1,min:1},learning_rate:{label:"Learning rate",step:"any",min:0},r:{label:"Rank r",step:1,min:1},lora_alpha:{label:"LoRA alpha",step:"any",min:0},max_seq_length:{label:"Longest row, tokens",step:1,min:8},max_steps:{label:"Stop after steps",step:1,min:1},save_steps:{label:"Checkpoint every",step:1,min:1}};function ln({model:e,file:t,validation:n,suffix:r,prompt:a,fields:o},s){let i=Object.fromEntries(Object.entries(o).filter(([,d])=>d!==""&&d!==!1&&d!==null));return{model:e||s,training_file:t.id,...n&&{validation_file:n.id},...r&&{suffix:r},...a&&{metadata:{sample_prompt:a.slice(0,512)}},method:{type:"supervised",supervised:{hyperparameters:i}}}}function Mr(e,t,n){let r=n(t,"loramux_training_tokens_total"),a=n(t,"loramux_training_seconds_total"),o=e.total_steps/e.steps_per_epoch;if(r>0&&a>0)return[e.trained_tokens*o*a/r,"at the speed of this server's training so far"];let s=n(t,"loramux_request_prompt_tokens_sum"),i=n(t,"loramux_request_prefill_time_seconds_sum");return s>0&&i>0?[3*e.tokens*o*i/s,"a guess from how fast this server reads prompts"]:[null,"not known before this server has answered a request"]}function Or({plan:e}){let[t,n]=_(0),[r,a]=_(!1),o=e.preview[Math.min(t,e.preview.length-1)],s=e.exact?"":"about ";return c`<div class="panel preview">
<dl class="figures">
<div><dt>rows</dt><dd>${e.rows.toLocaleString("en")}</dd></div>
<div><dt>tokens</dt><dd>${s}${e.tokens.toLocaleString("en")}</dd></div>
<div><dt>trained on</dt><dd>${s}${e.trained_tokens.toLocaleString("en")}</dd></div>
<div><dt>longest row</dt><dd>${be(e.longest,"token")}</dd></div>
${e.validation_rows>0&&c`<div><dt>validation rows</dt><dd>${e.validation_rows.toLocaleString("en")}</dd></div>`}
</dl>
${e.warnings.map(i=>c`<p class="note">${i[0].toUpperCase()+i.slice(1)}.</p>`)}
<div class="row spread wrap">
<span class="row">
<button
type="button"
aria-label="Previous row"
disabled=${t===0}
onClick=${()=>n(t-1)}
>‹</button>
<span>Line ${o.line}, ${be(o.tokens,"token")}, <mark class="learned">${o.trained_tokens} trained on</mark></span>
<button
type="button"
aria-label="Next row"
disabled=${t>=e.preview.length-1}
onClick=${()=>n(t+1)}
>›</button>
</span>
<div class="segments" role="group" aria-label="How rows are shown">
<button type="button" aria-pressed=${!r} onClick=${()=>a(!1)}>As a chat</button>
<button
type="button"
aria-pressed=${r}
onClick=${()=>a(!0)}
>As the trainer reads it</button>
</div>
</div>
${r?c`<pre class="tokens" tabindex="0">${o.parts.map(({text:i,trained:d})=>d?c`<mark class="learned">${i}</mark>`:i)}</pre>`:c`<div class="turns">
${o.turns.map(({role:i,content:d,trained:p})=>c`<div class=${`turn ${i}`}>
<span class="role">${i}</span>
<span class="text">${p?c`<mark class="learned">${d}</mark>`:d}</span>
</div>`)}
</div>`}
</div>`}var ta={"":"Automatic","all-linear":"All linears",attention:"Attention","attention-qv":"Attention, q and v"},na=400;function Nr(){let{file:e,validation:t,model:n,suffix:r,prompt:a,fields:o}=de.value,[s,i]=_(null),[d,p]=_(!1),[l,m]=_(null),[f,u]=_(null),[v,x]=_(!1),[b,g]=_([null,""]);A(()=>{if(m(null),!e)return i(null);let h=new AbortController,y=setTimeout(async()=>{p(!0);try{let w=await W("/v1/fine_tuning/plan",ln(de.value,F.value.id),{signal:h.signal});i(w),g(await bt(Y).then(j=>Mr(w,j,I),()=>[null,"this key may not see how fast the server is"]))}catch(w){if(w.name==="AbortError")return;m(w),w.param?.endsWith("_file")&&i(null),w.code==="file_not_found"&&re({file:null,validation:null})}p(!1)},na);return()=>{clearTimeout(y),h.abort()}},[e?.id,t?.id,n,JSON.stringify(o)]);let $=async h=>{h.preventDefault(),x(!0),u(null);try{let y=await W("/v1/fine_tuning/jobs",ln(de.value,F.value.id));Tr(),location.hash=`#/train/${y.id}`}catch(y){u(y),x(!1)}};return c`<section>
<div class="row spread"><h1>New fine-tuning job</h1><a href="#/train">All jobs</a></div>
<div class="split wide">
<div>
<${Pr}
label="Drop training data here"
file=${e}
onFile=${h=>re({file:h})}
hint="JSONL: a conversation, a prompt with its completion, or a text on every line."
/>
${e&&c`<${Pr}
label="Validation data, if you have some"
small
file=${t}
onFile=${h=>re({validation:h})}
/>`}
<${S}
error=${l}
title=${l?.param?.endsWith("_file")?"The data cannot be trained on yet":"The recipe does not work"}
/>
${s&&c`<${Or} plan=${s} />`}
</div>
<form class="panel recipe" onSubmit=${$}>
<h2>Recipe</h2>
<p class="muted">Fields left empty are chosen from the data.</p>
<div class="fields">
<${q} label="Model to train" wide><${ht}
label="Model to train on"
value=${n||F.value?.id}
onChange=${h=>re({model:h})}
/><//>
<${q} label="Name" hint="becomes part of the adapter's name" wide>
<input
type="text"
value=${r}
placeholder="support"
pattern="[A-Za-z0-9._\\-]{1,64}"
title="1 to 64 letters, digits and . _ -"
onInput=${h=>re({suffix:h.target.value})}
/>
<//>
${Object.entries(Ar).map(([h,{label:y,...w}])=>c`<${q} label=${y} hint=${s?.why[h]}>
<input
type="number"
...${w}
value=${o[h]??""}
placeholder=${s?.hyperparameters[h]??(h==="max_steps"?"never":"auto")}
onInput=${j=>Ke(h,j.target.value===""?"":j.target.valueAsNumber)}
/>
<//>`)}
<${q} label="Target modules" wide>
<select
value=${o.target_modules??""}
onChange=${h=>Ke("target_modules",h.target.value)}
>
${Object.entries(ta).map(([h,y])=>c`<option value=${h}>${y}</option>`)}
</select>
<//>
<${q} label="Prompt for samples" hint="answered by the base and by every checkpoint" wide>
<textarea
rows="2"
value=${a}
placeholder="What your adapter should do, as a user would ask"
onInput=${h=>re({prompt:h.target.value})}
></textarea>
<//>
</div>
<${ye}
label="Pack short rows together"
checked=${o.packing}
onChange=${h=>Ke("packing",h)}
/>
<${ye}
label="Train on the user's words too"
checked=${o.train_on_inputs}
onChange=${h=>Ke("train_on_inputs",h)}
/>
<${ra} plan=${s} planning=${d} time=${b} />
<${S} error=${f} />
<button class="primary full" disabled=${!s||l||d||v}>Start training</button>
</form>
</div>
</section>`}function Pr({label:e,hint:t,file:n,onFile:r,small:a}){let[o,s]=_(null),[i,d]=_(null),p=async([l])=>{d(null),s(0);let m=new FormData;m.append("purpose","fine-tune"),m.append("file",l);try{let{id:f,filename:u,bytes:v}=await ut("/v1/files",m,{onProgress:s});r({id:f,filename:u,bytes:v})}catch(f){d(f)}s(null)};return c`<div class=${a?"small":""}>
<${gt} label=${n?n.filename:e} accept=".jsonl,.json,.txt" onFiles=${p}>
${n?c`<p class="muted">${D(n.bytes)} <button type="button" class="quiet" onClick=${()=>r(null)}>Remove</button></p>`:t&&c`<p class="muted">${t}</p>`}
<//>
${o!==null&&c`<div class="progress" role="status"><${ce} label="Upload" value=${o} /> Sending, ${Math.round(o*100)} %</div>`}
<${S} error=${i} />
</div>`}function ra({plan:e,planning:t,time:[n,r]}){if(!e)return c`<p class="note" role="status">${t?"Reading the data…":"Drop training data to see what the run will take."}</p>`;let{memory:a}=e,o=[["optimizer and factors",a.adapter+a.gradients+a.optimizer],["layer inputs",a.layer_inputs],["activations or logits",Math.max(a.layer_activations,a.logits)]];return c`<dl class="estimate" aria-busy=${t} aria-label="Estimate">
<dt>Steps</dt><dd>${e.total_steps.toLocaleString("en")}</dd>
<dt>Memory beside serving</dt><dd>${D(a.total)} <span class="hint">${o.map(([s,i])=>`${s} ${D(i)}`).join(", ")}</span></dd>
<dt>Time</dt><dd>${n===null?"unknown":`about ${Z(n)}`} <span class="hint">${r}; requests that are served meanwhile add to it</span></dd>
<dt>Trainable</dt><dd>${be(e.trainable_parameters,"parameter")}</dd>
</dl>`}var on={succeeded:"good",failed:"bad",running:"busy",paused:"warn"},an={validating_files:"checking files"};function Dr(){let{rest:e}=J.value;return e==="new"?c`<${Nr} />`:e?c`<${Cr} key=${e} id=${e} />`:c`<${oa} />`}function oa(){let[e,t]=_(null),[n,r]=_(null);return B(async a=>{try{let o=(await R("/v1/fine_tuning/jobs?limit=100")).data;a()&&t(o)}catch(o){a()&&r(o)}},2),c`<section>
<div class="row spread">
<h1>Fine-tuning</h1>
<a class="button primary" href="#/train/new">New job</a>
</div>
<${S} error=${e?null:n} />
${!e&&!n&&c`<p class="muted">Asking the server…</p>`}
${e?.length===0&&c`<${mt} title="No jobs yet">
A job trains an adapter on the base that is served here, while it goes on serving. It begins with a JSONL file of conversations:
<a href="#/train/new">start a new job</a>.
<//>`}
${e?.length>0&&c`<div class="panel scroll" tabindex="0" role="region" aria-label="Table of jobs">
<table>
<thead><tr>${["Job","Status","Base","Result","Created"].map(a=>c`<th scope="col">${a}</th>`)}</tr></thead>
<tbody>
${e.map(a=>c`<tr key=${a.id}>
<th scope="row"><a href=${`#/train/${a.id}`}>${a.id}</a></th>
<td><${V} kind=${on[a.status]}>${an[a.status]??a.status}<//></td>
<td>${a.model}</td>
<td>${a.fine_tuned_model??a.error?.message??"–"}</td>
<td>${te(a.created_at)}</td>
</tr>`)}
</tbody>
</table>
</div>`}
</section>`}var cn={compare:["Compare",gr],adapters:["Adapters",mr],train:["Train",Dr],server:["Server",wr]},aa=5;G(()=>{document.title=`${cn[J.value.view]?.[0]??"Not found"} · loramux`});function sa(){B(Ae,aa,[L.value]),A(()=>document.getElementById("main").focus({preventScroll:!0}),[J.value.view]);let[,e]=cn[J.value.view]??[];return c`
<a
class="skip"
href="#main"
onClick=${t=>(t.preventDefault(),document.getElementById("main").focus())}
>Skip to content</a>
<header class="top">
<a class="brand" href="#/compare"><img src="/page/icon.svg" alt="" width="24" height="24" />loramux</a>
<nav aria-label="Views">
${Object.entries(cn).map(([t,[n]])=>c`<a href=${`#/${t}`} aria-current=${J.value.view===t?"page":void 0}>${n}</a>`)}
</nav>
<span class="grow"></span>
<span class="serving">${F.value&&c`<span class=${ge.value?"dot":"dot off"}></span>${F.value.id}`}</span>
${L.value&&c`<button
type="button"
class="quiet"
onClick=${()=>(qe(""),H.value=null,ie.value="You are signed out.")}
>Sign out</button>`}
<button
type="button"
class="quiet icon"
aria-label=${Ue.value?"Light colours":"Dark colours"}
title=${Ue.value?"Light colours":"Dark colours"}
onClick=${Qn}
>${Ue.value?"☀":"☾"}</button>
</header>
<div aria-live="assertive">
${!ge.value&&c`<p class="banner">The server cannot be reached. What runs there goes on; this page is trying to reconnect…</p>`}
</div>
<main id="main" tabindex="-1">
${ie.value?c`<${$r} />`:H.value?e?c`<${e} />`:c`<p>There is no such view. <a href="#/compare">Compare models</a> instead.</p>`:c`<p class="muted">Asking the server…</p>`}
</main>
<footer class="foot muted">
${!ie.value&&!L.value&&c`<a href="/openapi.json">API description</a><a href="/metrics">Metrics</a>`}
<a href="/page/licenses.txt">Licences</a>
</footer>
`}xn(c`<${sa} />`,document.body);
